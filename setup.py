"""Native build only; everything else is in pyproject.toml.

Builds gradkernels._C against the torch that is installed where gradkernels is being installed, also from inside pip's
build isolation, and gradkernels._C_cuda where that torch has CUDA and nvcc is there. Without a C++ compiler the package
installs without either: `gk.implementations()` then says so.
"""

import os
import shutil
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

SOURCES = [str(path) for folder in ("csrc", "csrc/cpu") for path in sorted(Path(folder).glob("*.cpp"))]
CUDA_SOURCES = [str(path) for suffix in ("cpp", "cu") for path in sorted(Path("csrc/cuda").glob(f"*.{suffix}"))]
HEADERS = [str(path) for path in Path("csrc").rglob("*.h")]
# The oldest torch whose stable ABI csrc/cuda keeps to; USE_CUDA makes torch's header declare the current stream.
CUDA_DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]
ARCHITECTURES = "8.0;9.0a;10.0+PTX"


def cuda_extensions(pybind_include: str) -> list:
    """gradkernels._C_cuda, or nothing where torch is built without CUDA or there is no nvcc, with the reason on stderr."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if torch.version.cuda is None:
        return []
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        print("gradkernels: no nvcc; installing without CUDA C++ kernels", file=sys.stderr)
        return []
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    flags = {"cxx": ["-std=c++20", "-O3", "-g0", *CUDA_DEFINES], "nvcc": ["-std=c++20", "-O3", *CUDA_DEFINES]}
    include = [pybind_include]
    return [CUDAExtension("gradkernels._C_cuda", CUDA_SOURCES, include, extra_compile_args=flags, depends=HEADERS)]


def native_build() -> dict:
    """Arguments of setup() that build the extensions, or none where that cannot be done, with the reason on stderr."""
    site.addsitedir(sysconfig.get_path("purelib"))  # pip's isolated build hides the torch that will run the extension
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, get_cxx_compiler
    except ImportError as error:
        raise SystemExit(f"gradkernels is built against the torch it will run with: install torch first ({error})") from None
    if shutil.which(get_cxx_compiler()) is None:
        print(f"gradkernels: no C++ compiler ({get_cxx_compiler()}); installing without native kernels", file=sys.stderr)
        return {}
    import pybind11

    # -fopenmp when compiling alone: at::parallel_for is inlined here, and its runtime is the one torch has already loaded.
    extension = CppExtension(
        "gradkernels._C",
        SOURCES,
        include_dirs=[pybind11.get_include()],
        extra_compile_args=["-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-g0"],
        depends=HEADERS,
    )
    extensions = [extension, *cuda_extensions(pybind11.get_include())]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExtension}}


setup(**native_build())
