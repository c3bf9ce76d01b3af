"""Only what setup.cfg cannot hold: the compiled core of the CPU loader, loaders/turbo.c. (In pyproject.toml, setuptools
calls that experimental.)

It is optional: without a C compiler or libjpeg-turbo's headers the engine installs without it.
"""

from setuptools import Extension, setup

core = Extension(
    "loaders._turbo",
    ["loaders/turbo.c"],
    libraries=["jpeg", "m"],
    extra_compile_args=["-std=c11", "-O3", "-D_GNU_SOURCE"],
    optional=True,
)
setup(ext_modules=[core])
