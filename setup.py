"""Native build only; everything else is in pyproject.toml.

Builds gradkernels._C against the torch that is installed where gradkernels is being installed, also from inside pip's
build isolation. Without a C++ compiler the package installs without it: `gk.implementations()` then says so.
"""

import shutil
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

SOURCES = [str(path) for folder in ("csrc", "csrc/cpu") for path in sorted(Path(folder).glob("*.cpp"))]


def native_build() -> dict:
    """Arguments of setup() that build the extension, or none where that cannot be done, with the reason on stderr."""
    site.addsitedir(sysconfig.get_path("purelib"))  # pip's isolated build hides the torch that will run the extension
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
    except ImportError as error:
        raise SystemExit(f"gradkernels is built against the torch it will run with: install torch first ({error})") from None
    if shutil.which(get_cxx_compiler()) is None:
        print(f"gradkernels: no C++ compiler ({get_cxx_compiler()}); installing without CPU kernels", file=sys.stderr)
        return {}
    import pybind11

    # -fopenmp when compiling alone: at::parallel_for is inlined here, and its runtime is the one torch has already loaded.
    extension = CppExtension(
        "gradkernels._C",
        SOURCES,
        include_dirs=[pybind11.get_include()],
        extra_compile_args=["-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-g0"],
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


setup(**native_build())
