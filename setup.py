"""What pip needs to know is in pyproject.toml; here is how vargpt's CUDA kernels are compiled, where they can be.

They are part of `pip install --no-build-isolation .`, which sees the torch that is installed, if there is an nvcc. The
environment variable VARGPT_CUDA says what to do: 0 installs without them, 1 fails where they cannot be compiled, and if
it is not set the installation goes on without them, and says why.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.errors import BaseError, CCompilerError

CSRC = Path("vargpt", "kernels", "csrc")
OLDEST_TORCH = (2, 10)  # whose stable ABI has all that the ops use; what is built runs with every later torch
ARCHITECTURES = "8.0;9.0+PTX"  # machine code for these two, and text that later GPUs' drivers compile


def cuda_home():
    """Where the CUDA toolkit lies: the directory that holds nvcc and the runtime's headers."""
    nvcc = shutil.which("nvcc")
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [named] if named else [*([Path(nvcc).parents[1]] if nvcc else []), "/usr/local/cuda"]
    for place in map(Path, places):
        if (place / "bin" / "nvcc").exists() and (place / "include" / "cuda_runtime.h").exists():
            return place
    raise RuntimeError(f"there is no CUDA toolkit (nvcc) in {' or '.join(map(str, places))}: set CUDA_HOME")


def kernels(required):
    """The arguments of setup() that compile the kernels.

    Raises:
        RuntimeError: there is no nvcc, or no torch to compile for.
    """
    home = cuda_home()
    if find_spec("torch") is None:
        raise RuntimeError("there is no torch here: install it, then use pip install --no-build-isolation")
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH or torch.version.cuda is None:
        raise RuntimeError(f"torch {torch.__version__} is older than 2.10, or was built without CUDA")
    os.environ["CUDA_HOME"] = str(home)  # torch's own search takes the first nvcc, which may be a mere script
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    class Build(BuildExtension):
        def run(self):
            try:
                super().run()
            except (RuntimeError, OSError, BaseError, CCompilerError) as error:
                if required:
                    raise
                tell(f"the compilation failed: {error}")
                self.extensions = []
                root = "" if self.editable_mode else self.build_lib  # where an earlier compilation left its own
                for old in Path(root, "vargpt", "kernels").glob("_cuda.*"):
                    old.unlink()
                wheel: Any = self.distribution.get_command_obj("bdist_wheel", create=False)
                if wheel is not None:  # what it holds now runs everywhere, and its name is to say so
                    wheel.root_is_pure = True

    target = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
    extension = CUDAExtension(
        "vargpt.kernels._cuda",
        [str(path) for path in sorted(CSRC.glob("*.cu"))],
        depends=[str(path) for path in sorted(CSRC.glob("*.cuh"))],
        include_dirs=[str(CSRC.resolve())],
        extra_compile_args={"cxx": [], "nvcc": ["-O3", "-DUSE_CUDA", target, "-Xcompiler", "-fvisibility=hidden"]},
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": Build},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def tell(reason):
    print(f"vargpt is installed without its CUDA kernels, and uses torch's attention: {reason}", file=sys.stderr)


def compiled():
    wish = os.environ.get("VARGPT_CUDA", "")
    if wish not in ("", "0", "1"):
        raise ValueError(f"VARGPT_CUDA must be 0 (never) or 1 (must) or not be set, not {wish!r}")
    if wish == "0":
        return {}
    try:
        return kernels(required=wish == "1")
    except (RuntimeError, ImportError, OSError) as error:
        if wish == "1":
            raise
        tell(error)
        return {}


setup(**compiled())
