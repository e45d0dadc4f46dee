"""Which models ``accelerate`` takes, and what in a model its forward would not compute.

A model that never fits is refused; a deviation may come and go: a hook, an adapter, dropout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from looped_fast.dropin import architectures, trm_structure
from looped_fast.dropin.architectures import ARCHITECTURES
from looped_fast.dropin.structure import Architecture, Loop, Model, has
from looped_fast.ops.modules import alteration, deviation, global_hooks
from looped_fast.ops.reference import autocast

_LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of a block


class UnsupportedModel(ValueError):
    """A model that can't be accelerated.

    Attributes:
        reasons: a string for each obstacle; the message lists them all.
    """

    def __init__(self, model_name: str, reasons: Iterable[str]) -> None:
        self.reasons = list(reasons)
        super().__init__(model_name, self.reasons)

    def __str__(self) -> str:
        return "\n  - ".join([f"can't accelerate {self.args[0]}:", *self.reasons])


def check_untouched(model: nn.Module, is_accelerated: bool) -> None:
    """Look for what hides the forward of the model's class.

    Raises:
        UnsupportedModel: the model is compiled, or has a forward of its own that ``accelerate`` did
            not put there.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise UnsupportedModel(name, ["it is compiled; accelerate the model, then compile it"])
    if "forward" in vars(model) and not is_accelerated:
        raise UnsupportedModel(name, ["its forward was replaced on this instance"])


def recognise(model: nn.Module) -> Architecture:
    """Return the architecture that ``model`` has the structure of.

    Raises:
        UnsupportedModel: it has none of them.
    """
    name = type(model).__name__
    architecture = architectures.recognise(model)
    if architecture is None:
        known = ", ".join((*(a.name for a in ARCHITECTURES), trm_structure.NAME))
        reasons = [f"it has the structure of none of: {known}", *_remedy(model)]
        raise UnsupportedModel(name, reasons)
    if reasons := list(missing(model, architecture)):
        raise UnsupportedModel(f"{name} as {architecture.name}", [*reasons, *_remedy(model)])
    return architecture


def _remedy(model: nn.Module) -> Iterator[str]:
    """Parts of the model that ``accelerate`` may take."""
    for name, part in model.named_children():
        if trm_structure.inner_of(part) is not None:
            yield f"its {name} has the structure of {trm_structure.NAME}: accelerate(model.{name})"
        known = architectures.recognise(part)
        if known and not list(missing(part, known)):
            yield f"its {name} has the structure of {known.name}: accelerate(model.{name})"


def missing(model: Model, architecture: Architecture) -> Iterator[str]:
    """Attributes that the fast forward reads and ``model`` lacks."""
    block_paths = ("ln_1.weight", "attn.c_attn.weight", "attn.c_proj.weight",
                   f"attn.{architecture.blocks.heads}", "ln_2.weight", "mlp.c_fc.weight",
                   "mlp.c_proj.weight")  # fmt: skip
    absent = [p for p in (*architecture.markers, *architecture.needs) if not has(model, p)]
    yield from (f"it has no {path}" for path in absent)
    if not set(absent).isdisjoint(architecture.markers):
        return  # there is no stack to look at
    stack = architecture.stack(model)
    for path in ("wpe.weight", "h", "ln_f.weight"):
        if not has(stack, path):
            yield f"its stack has no {path}"
    blocks = list(getattr(stack, "h", []))
    if not blocks:
        yield "its stack h holds no blocks"
    for i, block in enumerate(blocks):
        for path in block_paths:
            if not has(block, path):
                yield f"h.{i} has no {path}"


def deviations(model: Model, architecture: Architecture) -> Iterator[str]:
    """What would not run, or not be the same, in the fast forward: hooks, adapters, dropout."""
    yield from global_hooks()
    if absent := list(missing(model, architecture)):
        yield from absent
        return
    stack = architecture.stack(model)
    linears = [block.get_submodule(path) for block in stack.h for path in _LINEARS]
    kinds = dict.fromkeys(linears, architecture.blocks.linear())
    kinds |= {module: nn.Linear for name, module in model.named_children() if name == "_read_in"}
    kinds[stack.wpe] = nn.Embedding
    for name, module in model.named_modules():
        if module is model:
            continue
        yield from changed(name, module, kinds.get(module))
    if any(m.training and getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        yield "it recomputes activations block by block while training (gradient_checkpointing)"


def changed(name: str, module: Model, kind: type[nn.Module] | None = None) -> Iterator[str]:
    """Why ``module`` may not compute what its class, or ``kind``, does with its parameters."""
    if why := alteration(module) if kind is None else deviation(module, kind):
        yield f"{name} {why}"
    if module.training and (p := _dropout(module)) > 0:
        yield f"{name} drops out with p = {p} while training; set it to 0, or call eval()"


def _dropout(module: Model) -> float:
    """The dropout probability of ``module`` itself while training, if an attribute tells."""
    p = module.p if isinstance(module, _DropoutNd) else getattr(module, "dropout", 0.0)
    return p if isinstance(p, int | float) else 0.0


def unfit_parameters(stack: Model, loop: Loop) -> Iterator[str]:
    """Dtypes and shapes that the op refuses."""
    wpe = stack.wpe.weight
    if wpe.dtype not in (torch.float32, torch.float64):
        yield (
            f"its parameters are {wpe.dtype}; keep them in torch.float32, and choose the "
            f"precision of matrix products by torch.autocast, or precision='bf16'"
        )
        return
    embeddings = wpe.new_zeros(1, 1, wpe.shape[1])
    try:
        with torch.no_grad(), autocast(wpe.device.type, "fp32"):
            loop(embeddings, n_loops=1, window=1, injection="none")
    except ValueError as error:
        yield str(error)


@contextlib.contextmanager
def in_mode(model: Model, training: bool) -> Iterator[None]:
    """Put every module of ``model`` in that mode, and back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
