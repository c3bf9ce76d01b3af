"""The runtime alone, beside numpy: `pip install ./runtime`. The engine's own setup.py installs it too.

The compiled core is optional: without a C compiler numpy does the work.
"""

from setuptools import Extension, setup

core = Extension(
    "runtime._core",
    ["core.c"],
    depends=["bnn.h", "kernels.h"],
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-D_GNU_SOURCE"],
    optional=True,
)
setup(
    name="burn-runtime",
    version="0.1.0",
    description="Trained binary networks on a CPU, without PyTorch",
    license="Apache-2.0",
    python_requires=">=3.10",
    install_requires=["numpy>=1.26"],
    extras_require={"images": ["pillow"]},
    packages=["runtime"],
    package_dir={"runtime": "."},
    package_data={"runtime": ["bnn.h"]},
    ext_modules=[core],
    options={"build": {"build_base": "../build/runtime"}},  # the engine's tools look through all files of this folder
)
