"""Maps the top-level ``kernels/`` to ``looped_fast.kernels``; all metadata is in pyproject.toml."""

from setuptools import setup

setup(
    packages=["looped_fast", "looped_fast.kernels"],
    package_dir={"looped_fast": "looped_fast", "looped_fast.kernels": "kernels"},
)
