"""Maps ``kernels/`` and ``csrc/`` into the package, and compiles the CPU engine into a wheel.

That needs PyTorch where the build runs, which an isolated build does not see. Such a wheel has the
engine's sources alone, and ``looped_fast.ops.engine_file`` compiles them at their first use.
"""

import importlib.util
import runpy
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

SEES_TORCH = importlib.util.find_spec("torch") is not None
engine = runpy.run_path("csrc/build.py")


class Build(build_py):
    """Builds afresh, with an engine if there is a PyTorch for it; a failure is only a warning."""

    def run(self):
        if self.editable_mode:
            super().run()
            return
        # A module that is gone from the source tree would stay in the wheel.
        shutil.rmtree(Path(self.build_lib, "looped_fast"), ignore_errors=True)
        super().run()
        if not SEES_TORCH or engine["unsupported_platform"]():
            return
        try:
            engine["compile_engine"](Path(self.build_lib, "looped_fast/ops", engine["file_name"]()))
        except (engine["BuildError"], OSError) as error:
            print(f"looped_fast: a wheel without the CPU engine: {error}", file=sys.stderr)


class PlatformWheel(bdist_wheel):
    """The engine is for a platform and a PyTorch, but uses nothing of Python."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


class PlatformDistribution(Distribution):
    """Is installed where packages for one platform are."""

    def has_ext_modules(self):
        return True


setup(
    packages=[
        *find_packages(include=["looped_fast*"]),
        "looped_fast.csrc",
        "looped_fast.kernels",
        "looped_fast.moved",
    ],
    package_dir={
        "looped_fast": "looped_fast",
        "looped_fast.csrc": "csrc",
        "looped_fast.kernels": "kernels",
    },
    distclass=PlatformDistribution if SEES_TORCH else Distribution,
    cmdclass={"build_py": Build, **({"bdist_wheel": PlatformWheel} if SEES_TORCH else {})},
)
