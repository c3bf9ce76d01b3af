"""Only what setup.cfg cannot hold: the compiled cores of the CPU loader, loaders/turbo.c, and of the runtime,
runtime/core.c. (In pyproject.toml, setuptools calls that experimental.)

Both are optional: without a C compiler, or without libjpeg-turbo's headers for the first, the engine installs without.
"""

from setuptools import Extension, setup

loaders = Extension(
    "loaders._turbo",
    ["loaders/turbo.c"],
    libraries=["jpeg", "m"],
    extra_compile_args=["-std=c11", "-O3", "-D_GNU_SOURCE"],
    optional=True,
)
runtime = Extension(
    "runtime._core",
    ["runtime/core.c"],
    depends=["runtime/bnn.h", "runtime/kernels.h"],
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-D_GNU_SOURCE"],
    optional=True,
)
setup(ext_modules=[loaders, runtime])
