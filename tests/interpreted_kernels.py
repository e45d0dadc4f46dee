"""Make Triton's interpreter faster, with the same results and checks."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from without_coverage import untraced

from looped_fast.ops import triton_backend


def make_fast() -> None:
    """Keep coverage out of kernels, patch ``tl`` once per launch, and check integers in NumPy.

    Kernels are device code, which pyproject.toml excludes from coverage anyway. If the interpreter
    can't work, the first launch in a test raises an error.
    """
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    reason = triton_backend.uninterpretable()
    patched: set[frozenset[int]] = set()  # ``languages`` that the running launch has patched

    @untraced
    def launch_untraced(*args: Any, **kwargs: Any) -> None:
        if reason:
            pytest.fail(reason, pytrace=False)
        patched.clear()
        launch(*args, **kwargs)

    @functools.cache
    def languages(fn: Any) -> frozenset[int]:
        modules = (value for value in fn.__globals__.values() if inspect.ismodule(value))
        return frozenset(id(module) for module in modules if module in (tl, tl.core))

    def patch_once(fn: Any) -> Any:
        """Patch once: Triton does it at each call of a device function, and ignores the result."""
        if languages(fn) in patched:
            return None
        patched.add(languages(fn))
        return patch(fn)

    interpreter.GridExecutor.__call__ = launch_untraced
    interpreter._patch_lang = patch_once
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _check_overflow(semantic: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    """Check a sum, difference or product of integers as Triton does, but in NumPy."""
    dtype = lhs.type.scalar
    if dtype.int_bitwidth >= 64 or not semantic.builder.options.sanitize_overflow:
        return
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__](
        lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64)
    )
    least, most = dtype.get_int_min_value(), dtype.get_int_max_value()
    if exact.size and not least <= exact.min() <= exact.max() <= most:
        raise AssertionError(f"int{dtype.int_bitwidth} overflow detected for {binary_op.__name__}")
