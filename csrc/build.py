"""Compiles the CPU engine in this folder for the PyTorch that is installed.

It needs the standard library and torch alone, as ``setup.py`` runs this file before ``looped_fast``
can be imported.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
COMPILERS = ("g++", "c++", "clang++")
FLAGS = [
    "-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fopenmp", "-Wall",
    # ATen headers: pragmas for clang; gcc 12's own AVX-512 headers: false positives
    "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized",
]  # fmt: skip
_AVX512_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
# Sources -> their own flags, in the order of linking. Kernels are compiled once per instruction
# set; -march=native would tie a wheel to one machine. Sources for any CPU come first: of an inline
# function that several contain, the linker keeps the first.
SOURCES = {
    "ops.cpp": [],
    "select.cpp": [],
    "cpus.cpp": [],
    "memory.cpp": [],
    "threads.cpp": [],
    "kernels_avx2_fp32.cpp": [
        "-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2",
    ],
    "kernels_avx512_fp32.cpp": [
        *_AVX512_FLAGS, "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512",
    ],
    "kernels_avx512_bf16.cpp": [
        *_AVX512_FLAGS, "-mavx512bf16", "-DCPU_CAPABILITY=AVX512_BF16", "-DCPU_CAPABILITY_AVX512",
    ],
}  # fmt: skip


class BuildError(RuntimeError):
    """The engine can't be compiled.

    Attributes:
        output: all that the compiler printed.
    """

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


def unsupported_platform() -> str | None:
    """Return why there is no engine for this kind of machine, or None."""
    if sys.platform == "linux" and platform.machine() == "x86_64":
        return None
    return f"it has no kernels for {platform.system()} on {platform.machine()}"


def torch_tag() -> str:
    """The PyTorch versions that an engine built here loads into, as part of its file's name.

    Patch releases and variants (``+cpu``, ``+cu130``) of a release share the C++ interface of their
    minor version; a pre-release shares it with none.
    """
    import torch

    release = re.fullmatch(r"(\d+\.\d+)\.\d+(\+(cpu|cu\d+|rocm[\d.]+|xpu))?", torch.__version__)
    version = release[1] if release else re.sub(r"[^\w.+]", "_", torch.__version__)
    return f"torch{version}"


def file_name() -> str:
    """``engine-<PyTorch versions>-<hash of sources and flags>.so``."""
    digest = hashlib.sha256(repr((FLAGS, SOURCES)).encode())
    for file in sorted(FOLDER.iterdir()):
        if file.suffix in (".cpp", ".h"):
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    return f"engine-{torch_tag()}-{digest.hexdigest()[:12]}.so"


def find_compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX``, or the first of ``COMPILERS`` on the PATH.

    Raises:
        BuildError: there is none.
    """
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    missing = f"CXX names {wanted[0]}, which is not" if wanted else "no C++ compiler (g++) is"
    raise BuildError(
        f"{missing} on the PATH; install one (apt-get install g++, dnf install gcc-c++, or "
        f"conda install gxx_linux-64)"
    )


def compile_engine(target: Path) -> None:
    """Compile the engine for the PyTorch that is installed; ``target`` appears when it is whole.

    Raises:
        BuildError: there is no compiler, or it fails; the message has its first error.
        OSError: a file can't be written.
    """
    import torch

    compiler, root = find_compiler(), Path(torch.__file__).parent
    includes = ["-isystem", str(root / "include")]
    defines = [
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f'-DLOOPED_FAST_TORCH="{torch.__version__}"',
    ]
    libraries = ["-L", str(root / "lib"), "-ltorch_cpu", "-lc10", "-fopenmp"]
    with tempfile.TemporaryDirectory(prefix="looped_fast-") as folder:
        objects = [str(Path(folder, name).with_suffix(".o")) for name in SOURCES]

        def compile_one(name: str, to: str) -> None:
            flags = [*FLAGS, *SOURCES[name], *defines, *includes]
            run([*compiler, *flags, "-c", str(FOLDER / name), "-o", to], name)

        with ThreadPool(min(len(SOURCES), os.cpu_count() or 1)) as pool:
            pool.starmap(compile_one, zip(SOURCES, objects, strict=True), chunksize=1)
        target.parent.mkdir(parents=True, exist_ok=True)
        whole = target.with_name(f"{target.name}.{os.getpid()}")
        try:
            run([*compiler, "-shared", "-o", str(whole), *objects, *libraries], target.name)
            whole.replace(target)
        finally:
            whole.unlink(missing_ok=True)


def run(command: list[str], product: str) -> str:
    """Run a compiler's command to make ``product``; return what it prints.

    Raises:
        BuildError: it can't be run, or fails; the message has its first error.
    """
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]} can't be run: {error}") from error
    if done.returncode:
        output = f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        first = lines[0] if lines else f"exit status {done.returncode}"
        raise BuildError(f"{command[0]} fails on {product}: {first.strip()}", output)
    return done.stdout
