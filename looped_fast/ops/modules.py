"""Whether modules still compute what the op computes from their parameters.

The op reads parameters. A hook, an adapter, pruning or a changed attribute makes a module compute
something else, and shows on the module alone. ``Watch`` looks for such changes before every call of
a model, in about ten microseconds.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from itertools import chain
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _globals
from torch.nn.utils import parametrize
from torch.utils.module_tracker import ModuleTracker

Reasons = tuple[str, ...]
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = [getattr(_globals, f"_global{kind}") for kind in _HOOKS]
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_PLAIN = (bool, int, float, str, type(None), torch.dtype, *_FUNCTIONS)
_DENSE = {Tensor, nn.Parameter, type(None)}
_KEPT = 32  # verdicts
_WITHOUT_SETTINGS = {nn.Linear, nn.ModuleList, nn.ModuleDict}  # their attributes decide nothing


def constant_in_graphs(function: AnyFunction) -> AnyFunction:
    """Mark a function that torch.compile calls while it traces, for a constant.

    As ``torch.compiler.assume_constant_result``, which imports the compiler: two seconds, and
    Triton.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Watch:
    """Verdicts on a model, each valid as long as its modules are what they were.

    A copy or an unpickled watch keeps the verdicts, and looks at the modules again.

    Args:
        judge: model -> reasons why the op would not compute what the modules do; empty if it
            would. Runs when the modules are in a state that has no verdict.
        of_model: attributes of the model itself count, too, as its forward may decide by them.
        called: names of children that a fast forward calls as modules, so that what they are and
            compute does not matter.
    """

    def __init__(
        self, judge: Callable[[Any], Reasons], of_model: bool, called: Collection[str] = ()
    ) -> None:
        self._judge = judge
        self._first = 0 if of_model else 1
        self._called = called
        self._verdicts: dict[Hashable, Reasons] = {}
        self._snapshot: _Snapshot | None = None
        self._current: Reasons = ()
        self._said: set[Reasons] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_snapshot": None}  # which refers to the modules of one model

    def __call__(self, model: nn.Module) -> Reasons:
        """Return the verdict. Hooks of ``model`` itself do not count, as its caller runs them."""
        if self._snapshot is None or not self._snapshot.holds():
            modules = self._modules(model)
            snapshot = _Snapshot(list(modules.values()), self._first)
            state = _fingerprint(modules, self._first)
            if state not in self._verdicts:
                self._verdicts[state] = self._judge(model)
                if len(self._verdicts) > _KEPT:
                    del self._verdicts[next(iter(self._verdicts))]
            self._snapshot, self._current = snapshot, self._verdicts[state]
        return self._current

    def overlook_changes(self, model: nn.Module) -> None:
        """Keep the verdict although the model's own forward may have set attributes."""
        if self._snapshot is None or not self._snapshot.holds():
            self._snapshot = _Snapshot(list(self._modules(model).values()), self._first)

    def _modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Names, and modules that are watched; the model itself first."""
        named = model.named_modules()
        return {name: m for name, m in named if name.partition(".")[0] not in self._called}

    def say_once(self, message: str, reasons: Reasons) -> None:
        """Warn with ``message`` and ``reasons``, unless that was done before."""
        if reasons not in self._said:
            self._said.add(reasons)
            warnings.warn(f"{message}: {'; '.join(reasons)}", stacklevel=3)


class _Snapshot:
    """What the modules of a model are, with references to compare them by.

    Attributes count from the module ``first`` on; the model itself is module 0.
    """

    def __init__(self, modules: list[nn.Module], first: int) -> None:
        states = [vars(module) for module in modules]
        deciding = _deciding(modules[first:])
        watched = [(state, names) for state in _with_records(deciding) if (names := _plain(state))]
        self._modules, self._states = modules, states[1:]
        self._children = [state["_modules"] for state in states if state["_modules"]]
        self._parameters = [state["_parameters"] for state in states if state["_parameters"]]
        self._buffers = [state["_buffers"] for state in states if state["_buffers"]]
        self._hooks = [state[kind] for state in states[1:] for kind in _HOOKS]
        self._plain = [(itemgetter(*names), state) for state, names in watched]
        self._seen = self._look()

    def holds(self) -> bool:
        """True if nothing has changed."""
        try:
            return self._look() == self._seen
        except KeyError:  # an attribute is gone
            return False

    def _look(self) -> list[Any]:
        parameters = chain.from_iterable([table.values() for table in self._parameters])
        return [
            list(map(type, self._modules)),
            list(map(len, self._states)),  # a forward on the instance, say
            list(map(len, self._hooks)),
            list(map(list, _GLOBAL_HOOKS)),  # by their keys
            [list(table.values()) for table in self._children],
            set(map(type, parameters)) <= _DENSE,
            [(id(b), version(b)) for table in self._buffers for b in table.values()],
            [get(state) for get, state in self._plain],
        ]


def _deciding(modules: list[nn.Module]) -> list[dict[str, Any]]:
    return [vars(module) for module in modules if type(module) not in _WITHOUT_SETTINGS]


def _plain(state: dict[str, Any]) -> list[str]:
    """Names of attributes that a forward may decide by, and that can be compared."""
    return [name for name, value in state.items() if _is_plain(value)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


def _with_records(states: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The attributes of modules, then those of records of settings among them (``config``)."""
    records = {}
    for state in states:
        yield state
        for value in state.values():
            if not isinstance(value, (nn.Module, Tensor, type, *_PLAIN)) and not callable(value):
                records[id(value)] = getattr(value, "__dict__", {})
    yield from records.values()


def version(buffer: Tensor | None) -> int | None:
    """How often a buffer was changed in place; None if PyTorch does not count it."""
    return None if buffer is None or buffer.is_inference() else buffer._version


def _fingerprint(named: dict[str, nn.Module], first: int) -> Hashable:
    """What ``_Snapshot`` looks at, by values: equal for a copy of the model."""
    modules = list(named.values())
    states = [vars(module) for module in modules]
    deciding = _deciding(modules[first:])
    parameters = [p for state in states for p in state["_parameters"].values() if p is not None]
    buffers = [b for state in states for b in state["_buffers"].values() if b is not None]
    return (
        tuple((name, type(module)) for name, module in named.items()),
        tuple(tuple(state) for state in states[1:]),
        tuple(len(state[kind]) > 0 for state in states[1:] for kind in _HOOKS),
        tuple(any(_in_force(hooks)) for hooks in _GLOBAL_HOOKS),
        tuple((type(p), p.shape) for p in parameters),
        tuple((b.shape, b.double().sum().item()) for b in buffers if _is_readable(b)),
        tuple(tuple((n, s[n]) for n in _plain(s)) for s in _with_records(deciding)),
    )


def _is_readable(buffer: Tensor) -> bool:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(buffer)
    return type(buffer) is Tensor and buffer.device.type != "meta" and not wrapped


def _hooks(tables: Iterable[Any]) -> list[str]:
    kinds = [kind.strip("_").removesuffix("s") for kind in _HOOKS]
    return [kind for kind, hooks in zip(kinds, tables, strict=True) if any(_in_force(hooks))]


def _in_force(hooks: dict[int, Any]) -> Iterator[bool]:
    """Which hooks need the module's own values.

    Those of FlopCounterMode only note its name. Those of transformers stay after a call that asked
    for hidden states, and do nothing in another.
    """
    inert = "transformers.utils.output_capturing"
    return (
        type(getattr(h, "__self__", None)) is not ModuleTracker
        and getattr(h, "__module__", None) != inert
        for h in hooks.values()
    )


def global_hooks() -> list[str]:
    """Hooks that run at every call of any module."""
    return [
        f"every module has a {kind} (torch.nn.modules.module)" for kind in _hooks(_GLOBAL_HOOKS)
    ]


def alteration(module: nn.Module) -> str | None:
    """Why ``module`` may not compute what its class does with its parameters, or None."""
    if hooks := _hooks(getattr(module, kind) for kind in _HOOKS):
        return f"has a {hooks[0]}"
    if "forward" in vars(module):
        return "has a forward of its own"
    if parametrize.is_parametrized(module):
        return "is parametrized"
    for name, parameter in module._parameters.items():
        if type(parameter) not in _DENSE and hasattr(type(parameter), "__tensor_flatten__"):
            return f"has a {_name(type(parameter))} as its {name}"
    return None


def deviation(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Why ``module`` is not exactly a ``kind`` whose parameters the op can read, or None."""
    altered = alteration(module)
    if altered is None and type(module) is not kind:
        return f"is a {_name(type(module))}, not {_name(kind)}"
    if isinstance(module, nn.Embedding) and _changes_its_weight(module):
        return "is an Embedding with max_norm, sparse, padding_idx or scale_grad_by_freq"
    return altered


def _name(kind: type) -> str:
    name = f"{kind.__module__}.{kind.__qualname__}"
    return "torch.nn." + kind.__name__ if getattr(nn, kind.__name__, None) is kind else name


def _changes_its_weight(embedding: nn.Embedding) -> bool:
    settings = embedding.max_norm, embedding.padding_idx
    return settings != (None, None) or embedding.sparse or embedding.scale_grad_by_freq
