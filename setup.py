"""Maps ``kernels/`` to ``looped_fast.kernels`` and builds the CPU engine; metadata: pyproject.toml.

The engine is optional. Without torch (which an isolated build does not see: use
``pip install --no-build-isolation``), a compiler or OpenMP the package installs without the engine,
runs on the reference backend, and ``looped_fast.explain_backend`` says why.
"""

import os
import platform
import sys
import tempfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

from setuptools import find_packages, setup

SOURCES = ["ops.cpp", "cpus.cpp", "memory.cpp", "threads.cpp"]
# Kernels are compiled once per instruction set; -march=native would tie a wheel to one machine.
AVX512_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISA_FLAGS = {
    "kernels_avx2_fp32.cpp": [
        "-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2",
    ],
    "kernels_avx512_fp32.cpp": [
        *AVX512_FLAGS, "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512",
    ],
    "kernels_avx512_bf16.cpp": [
        *AVX512_FLAGS, "-mavx512bf16", "-DCPU_CAPABILITY=AVX512_BF16", "-DCPU_CAPABILITY_AVX512",
    ],
}  # fmt: skip


def warn(reason):
    """Print on stderr why there will be no engine."""
    print(f"looped_fast: building without the CPU engine: {reason}", file=sys.stderr)


def engine_build():
    """Keyword arguments of ``setup`` that build the engine; empty if it can't be built."""
    if platform.machine().lower() not in ("x86_64", "amd64") or os.name == "nt":
        warn(f"no kernels for {platform.system()} on {platform.machine()}")
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        warn("torch is not installed where the build runs (pip install --no-build-isolation)")
        return {}

    class BuildEngine(BuildExtension):
        """Compiles in parallel, each source with its own flags; a failure is only a warning."""

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, use_ninja=False)
            self.force = True  # up-to-date objects may be for another torch

        def build_extensions(self):
            try:
                self._check_openmp()
                self.compiler.compile = self._compile
                super().build_extensions()
            except Exception as error:
                warn(error)

        def _check_openmp(self):
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder, "openmp.cpp")
                source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads(); }")
                try:
                    self.compiler.compile(
                        [str(source)], output_dir=folder, extra_postargs=["-fopenmp"]
                    )
                except Exception as error:
                    raise RuntimeError(f"no C++ compiler with OpenMP ({error})") from error

        def _compile(self, sources, output_dir=None, macros=None, include_dirs=None, debug=0,
                     extra_preargs=None, extra_postargs=None, depends=None):  # fmt: skip
            compiler = self.compiler
            macros, objects, extra_postargs, pp_opts, build = compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            cc_args = compiler._get_cc_args(pp_opts, debug, extra_preargs)

            def compile_one(obj):
                source, suffix = build[obj]
                flags = [*extra_postargs, *ISA_FLAGS.get(Path(source).name, [])]
                compiler._compile(obj, source, suffix, cc_args, flags, pp_opts)

            with ThreadPool(min(len(objects), os.cpu_count() or 1)) as pool:
                pool.map(compile_one, objects, chunksize=1)
            return objects

    extension = CppExtension(
        "looped_fast.ops._C",
        [f"csrc/{name}" for name in (*SOURCES, *ISA_FLAGS)],
        depends=[str(header) for header in Path("csrc").glob("*.h")],
        extra_compile_args=[
            "-O3", "-fopenmp", "-g0", "-Wall",
            # ATen headers: pragmas for clang; gcc 12's own AVX-512 headers: false positives
            "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized",
        ],
        extra_link_args=["-fopenmp"],
        py_limited_api=True,
        optional=True,
    )  # fmt: skip
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildEngine}}


setup(
    packages=[*find_packages(include=["looped_fast*"]), "looped_fast.kernels", "looped_fast.moved"],
    package_dir={"looped_fast": "looped_fast", "looped_fast.kernels": "kernels"},
    **engine_build(),
)
