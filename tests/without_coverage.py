"""Keep third-party code that takes most of its tests' time out of coverage.

While coverage traces, Python 3.11 runs all code at half speed, not only the traced files.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

ENTRIES = (  # module, class, function
    ("torch._dynamo.convert_frame", "CatchErrorsWrapper", "__call__"),  # torch.compile of a frame
    ("matplotlib.figure", "Figure", "savefig"),
)


def untraced(function: Callable) -> Callable:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return function(*args, **kwargs)
        finally:
            sys.settrace(trace)

    return call


def leave_out_compilers() -> None:
    for module, owner, name in ENTRIES:
        if not find_spec(module.partition(".")[0]):
            continue
        place = getattr(importlib.import_module(module), owner)
        setattr(place, name, untraced(getattr(place, name)))
