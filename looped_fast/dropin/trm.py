"""The public Tiny Recursive Model: its recursion as calls of the op, all else as it is.

Embeddings, puzzle embeddings and heads are called as the model's own modules, so their hooks, and
the optimizer of sparse puzzle embeddings, keep working; the op stands in for ``L_level``.

Source: SamsungSAILMontreal/TinyRecursiveModels, ``models/recursive_reasoning/trm.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from looped_fast.dropin import checks, verify
from looped_fast.dropin.forward import FastForward
from looped_fast.dropin.structure import Example, Model
from looped_fast.dropin.trm_structure import NAME, block_settings, block_weights, missing
from looped_fast.dropin.verify import MAX_TOKENS
from looped_fast.model import ambient_precision
from looped_fast.model.trm import CALLED
from looped_fast.model.trm_checks import check_n_points
from looped_fast.model.trm_recursion import deep_recursion, looped_net
from looped_fast.ops import reference
from looped_fast.ops.call import Call, LoopSettings
from looped_fast.ops.modules import global_hooks, version

_PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp32"}
_SHORT = 5  # tokens

# (x, z_H, z_L), each [B, S, D] -> the next z_H and z_L
Recursion = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class TRMForward(FastForward):
    """The fast forward of ``TinyRecursiveReasoningModel_ACTV1_Inner``.

    States are float32 inside a supervision step, whatever ``forward_dtype`` is (but float64);
    those and the logits that the caller gets have the dtypes of the model's own forward.
    """

    called = CALLED

    def __init__(self, model: Model, *settings: Any) -> None:
        super().__init__(model, f"{NAME}_Inner", *settings)
        self._stacked: tuple[Any, Any, Any] = (None, None, None)  # key, its tensors, their stack

    def fast(self, carry: Model, batch: dict[str, Tensor]) -> tuple[Any, ...]:
        """Return what the model's own forward does, by the op."""
        return _forward(self.model, self._recurse, carry, batch)

    def _recurse(self, x: Tensor, z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
        model, config = self.model, self.model.config
        dtype = functools.reduce(torch.promote_types, (x.dtype, z_H.dtype, z_L.dtype))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weights = [w.to(wide) for layer in model.L_level.layers for w in block_weights(layer)]
        settings = self._settings(self._precision(dtype, x.device.type))
        net = looped_net(self.graphed, self._tables(wide), weights, settings)
        x, z_H, z_L = (t.to(wide) for t in (x, z_H, z_L))
        z_H, z_L = deep_recursion(net, x, z_H, z_L, config.L_cycles, config.H_cycles)
        return z_H.to(dtype), z_L.to(dtype)

    def _tables(self, dtype: torch.dtype) -> Tensor | None:
        """The tables of rotary positions, at one address while the model's are."""
        if not hasattr(self.model, "rotary_emb"):
            return None
        cos_sin = self.model.rotary_emb()
        if torch.compiler.is_compiling():
            return torch.stack(cos_sin).to(dtype)
        key = dtype, *((id(table), version(table)) for table in cos_sin)
        if key != self._stacked[0]:
            self._stacked = key, cos_sin, torch.stack(cos_sin).to(dtype)
        return self._stacked[2]

    def _precision(self, dtype: torch.dtype, device: str) -> str:
        """Operands of matrix products: as ``accelerate`` was told, or as the model's dtype says."""
        return self.precision or _PRECISIONS.get(dtype) or ambient_precision(device)

    def _settings(self, precision: str) -> LoopSettings:
        return LoopSettings(
            n_heads=self.model.L_level.layers[0].self_attn.num_heads,
            n_loops=self.model.config.L_cycles,
            window=1,
            precision=precision,
            backend=self.backend,
            attention=self.attention,
            block=block_settings(self.model),
        )

    def describe_call(
        self,
        batch_size: int,
        n_points: int | None = None,
        precision: str | None = None,
        replayed_training: bool = False,
    ) -> Call:
        """Describe an update of z_L for the choice of a backend; see ``explain_backend``."""
        model, config = self.model, self.model.config
        check_n_points(n_points, config.seq_len)
        weight = model.L_level.layers[0].self_attn.o_proj.weight
        dtype = getattr(model, "forward_dtype", weight.dtype)
        settings = self._settings(precision or self._precision(dtype, weight.device.type))
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        n_tokens, n_layer = config.seq_len + model.puzzle_emb_len, len(model.L_level.layers)
        sizes = batch_size, n_tokens, weight.shape[0], n_layer
        replayed = replayed_training or self.graphed.replays_on(weight.device)
        return Call(settings, weight.device, wide, *sizes, replayed, replayed_training)

    def changes(self) -> Iterator[str]:
        """Say what would not run, or not be the same, in ``fast``: hooks, adapters, dropout."""
        model = self.model
        yield from global_hooks()
        if absent := list(missing(model)):
            yield from absent
            return
        for name, module in model.L_level.named_modules(prefix="L_level"):
            yield from checks.changed(name, module)
        for what, values in (
            ("norm_eps", {layer.norm_eps for layer in model.L_level.layers}),
            ("num_heads", {layer.self_attn.num_heads for layer in model.L_level.layers}),
        ):
            if len(values) > 1:
                yield f"its blocks differ in {what}: {', '.join(map(str, sorted(values)))}"

    def differences(self, outputs_only: bool) -> list[str]:
        """Say by numbers how ``fast`` differs; ``outputs_only`` for a model verified before.

        The network is compared with the op's oracle, and the schedule with ours around a cheap
        function in place of the network.
        """
        model, generator = self.model, torch.Generator().manual_seed(0)
        with verify.no_trace(model), torch.set_grad_enabled(not outputs_only):
            found = [
                *_different_blocks(model, generator),
                *_different_network(model, generator, _SHORT if outputs_only else MAX_TOKENS),
            ]
            return found or list(_different_schedule(model, generator))


def _forward(
    model: Model, recurse: Recursion, carry: Model, batch: dict[str, Tensor]
) -> tuple[Any, ...]:
    """``_Inner.forward`` around ``recurse``: the next carry, logits, and two logits of halting."""
    x = model._input_embeddings(batch["inputs"], batch["puzzle_identifiers"])
    z_H, z_L = recurse(x, carry.z_H, carry.z_L)
    after = type(carry)(z_H=z_H.detach(), z_L=z_L.detach())
    logits = model.lm_head(z_H)[:, model.puzzle_emb_len :]
    q = model.q_head(z_H[:, 0]).to(torch.float32)
    return after, logits, (q[..., 0], q[..., 1])


def _cos_sin(model: Model, n_tokens: int) -> tuple[Tensor, Tensor] | None:
    """Rotary tables of the first tokens in float64, as ``L_level`` takes them."""
    if not hasattr(model, "rotary_emb"):
        return None
    cos, sin = (table[:n_tokens].detach().cpu().double() for table in model.rotary_emb())
    return cos, sin


def _different_blocks(model: Model, generator: torch.Generator) -> Iterator[str]:
    """Compare each block, also on inputs of a mean square near eps, which a larger one hides."""
    block, cos_sin = block_settings(model), _cos_sin(model, _SHORT)
    tables = None if cos_sin is None else torch.stack(cos_sin)

    def ours(layer: Model, x: Tensor) -> Tensor:
        weights, n_heads = block_weights(layer), layer.self_attn.num_heads
        of_block = reference.BlockWeights.of(weights, block)
        return reference.transformer_block(x, of_block, n_heads, None, block, tables)

    def theirs(layer: Model, x: Tensor) -> Tensor:
        return layer(cos_sin=cos_sin, hidden_states=x)

    for i, layer in enumerate(model.L_level.layers):
        D = layer.self_attn.qkv_proj.weight.shape[1]
        x = verify.randn((4, _SHORT, D), generator)
        x[:2] *= block.norm_eps**0.5
        with torch.no_grad():  # the network's gradients are compared
            why = verify.mismatch(layer, theirs, ours, Example(x), generator)
        if why is not None:
            yield (
                f"L_level.layers.{i} is not full attention with {layer.self_attn.num_heads} heads, "
                f"then SwiGLU, each followed by RMSNorm with eps {block.norm_eps}: {why}"
            )


def _different_network(model: Model, generator: torch.Generator, most: int) -> Iterator[str]:
    """Compare one update of a state on inputs of full length, which show a limited attention."""
    block, layers = block_settings(model), model.L_level.layers
    D = layers[0].self_attn.qkv_proj.weight.shape[1]
    n_tokens = min(most, model.config.seq_len + model.puzzle_emb_len)
    cos_sin = _cos_sin(model, n_tokens)
    tables = None if cos_sin is None else torch.stack(cos_sin)
    z, injected = (verify.randn((1, n_tokens, D), generator) for _ in range(2))
    if torch.is_grad_enabled():
        z, injected = z.requires_grad_(), injected.requires_grad_()

    def ours(level: Model, z: Tensor, injected: Tensor) -> Tensor:
        weights = [weight for layer in level.layers for weight in block_weights(layer)]
        n_heads = level.layers[0].self_attn.num_heads
        return reference.step(z, injected, tables, weights, n_heads, "add", block)

    def theirs(level: Model, z: Tensor, injected: Tensor) -> Tensor:
        return level(z, injected, cos_sin=cos_sin)

    call = Example(z, injected)
    if (why := verify.mismatch(model.L_level, theirs, ours, call, generator)) is not None:
        yield f"L_level is not its blocks in turn on the sum of its {n_tokens} inputs: {why}"


class _CheapNetwork(nn.Module):
    """A function in place of ``L_level`` that tells steps and states apart."""

    def forward(self, hidden_states: Tensor, input_injection: Tensor, **_: Any) -> Tensor:
        return torch.sin(1.25 * hidden_states + input_injection)


def _different_schedule(model: Model, generator: torch.Generator) -> Iterator[str]:
    """Compare a supervision step, its network and embeddings replaced by cheap functions."""
    shape = 2, model.config.seq_len + model.puzzle_emb_len, model.q_head.weight.shape[1]
    x, z_H, z_L = (verify.randn(shape, generator) for _ in range(3))
    if torch.is_grad_enabled():
        x.requires_grad_()
    carry = type(model.empty_carry(2))(z_H=z_H, z_L=z_L)
    batch = {"inputs": x, "puzzle_identifiers": verify.randn((2, 1, 1), generator)}

    def recurse(x: Tensor, z_H: Tensor, z_L: Tensor) -> tuple[Tensor, Tensor]:
        def net(injected: Tensor, state: Tensor, n: int) -> Tensor:
            for _ in range(n):
                state = model.L_level(state, injected)
            return state

        return deep_recursion(net, x, z_H, z_L, model.config.L_cycles, model.config.H_cycles)

    def ours(model: Model, carry: Model, batch: dict[str, Tensor]) -> tuple[Any, ...]:
        return _forward(model, recurse, carry, batch)

    with verify.no_trace(model):
        model._input_embeddings = lambda inputs, identifiers: inputs + identifiers
        model.__dict__["_modules"] = {**model._modules, "L_level": _CheapNetwork()}
        call = Example(carry, batch)
        why = verify.mismatch(model, type(model).forward, ours, call, generator)
    if why is not None:
        yield f"its forward is not {NAME}_Inner's: {why}"
