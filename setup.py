"""Native build only; everything else is in pyproject.toml.

Builds gradkernels._C against the torch that is installed where gradkernels is being installed, also from inside pip's
build isolation, and gradkernels._C_cuda where that torch has CUDA and nvcc is there. Without a C++ compiler the package
installs without either: `gk.implementations()` then says so.
"""

import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

SOURCES = [
    str(path)
    for folder in ("csrc", "csrc/autograd", "csrc/cpu", "csrc/cpu/lstm")
    for path in sorted(Path(folder).glob("*.cpp"))
]
CUDA_SOURCES = [str(path) for suffix in ("cpp", "cu") for path in sorted(Path("csrc/cuda").glob(f"*.{suffix}"))]
CFLAGS = shlex.split(os.environ.get("CFLAGS", ""))
HEADERS = [str(path) for path in Path("csrc").rglob("*.h")]
# The oldest torch whose stable ABI csrc/cuda keeps to; USE_CUDA makes torch's header declare the current stream.
CUDA_DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA"]


def cuda_extensions(pybind_include: str) -> list:
    """gradkernels._C_cuda; nothing where torch is built without CUDA or its nvcc is not there, with the reason on stderr."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if torch.version.cuda is None:
        return []
    nvcc = shutil.which("nvcc", path=str(Path(CUDA_HOME or "nowhere") / "bin"))
    ask = lambda *options: subprocess.run([nvcc, *options], capture_output=True, text=True, check=True)  # noqa: E731
    said = ask("--version").stdout if nvcc else ""
    found = re.search(r"release (\d+)\.(\d+)", said)
    release = (int(found[1]), int(found[2])) if found else (0, 0)
    if release[0] != int(torch.version.cuda.split(".")[0]):
        print(f"gradkernels: no nvcc of CUDA {torch.version.cuda}; installing without CUDA C++ kernels", file=sys.stderr)
        return []
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if release >= (12, 8) else "8.0;9.0+PTX")
    flags = {"cxx": ["-std=c++20", "-O3", "-g0"], "nvcc": ["-std=c++20", "-O3", "--threads=3"]}
    flags = {compiler: [*options, *CUDA_DEFINES] for compiler, options in flags.items()}
    # torch looks for libcudart beside the nvcc that it finds, which may be a script or a link: nvcc itself knows where it is.
    steps = ask("--dryrun", "-x", "cu", os.devnull).stderr
    libraries = re.findall(r'"-L(.+?)"', steps.partition("LIBRARIES=")[2].partition("\n")[0])
    options = {"include_dirs": [pybind_include], "library_dirs": libraries}
    options |= {"extra_compile_args": flags, "depends": HEADERS}
    return [CUDAExtension("gradkernels._C_cuda", CUDA_SOURCES, **options)]


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

    # The user's own CFLAGS come last, so that an optimization level among them wins (`make asan`).
    # -fopenmp when compiling alone: at::parallel_for is inlined here, and its runtime is the one torch has already loaded.
    extension = CppExtension(
        "gradkernels._C",
        SOURCES,
        include_dirs=[pybind11.get_include()],
        extra_compile_args=["-std=c++20", "-O3", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-g0", *CFLAGS],
        depends=HEADERS,
    )
    extensions = [extension, *cuda_extensions(pybind11.get_include())]
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildExtension}}


setup(**native_build())
