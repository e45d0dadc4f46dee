"""Providers of attention inside the loop: this project's kernel, PyTorch, and flash-attn.

Short sequences go to the project's kernel, whose tiles fit them: FlashAttention's are 128 x 128
scores, so that at 82 tokens it computes 4.8 times the causal ones, and it returns fresh tensors,
which take more launches to copy into the saved activations. Its backward has 5 products to our 7,
which pays beyond ``SHORT`` tokens. These are counts, not times: ``make gpu-check`` times all three.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from looped_fast.ops.call import Call
from looped_fast.ops.selection import Selection, select_by

from . import attention

SHORT = 256  # tokens: 49152 scores in FlashAttention's tiles, 36864 in tiles of 32, 32896 needed
MIN_FLASH_ATTN = "2.7"  # since then its inner functions take window_size_left and _right
MIN_CAPABILITY = (8, 0)  # for either FlashAttention


@dataclass(frozen=True)
class Provider:
    """One way to compute attention. ``forward`` and ``backward`` are as in ``attention.py``."""

    unsupported: Callable[[Call], str | None]  # why it can't run a call, or None
    forward: Callable[[Tensor, Tensor, Tensor, int, bool], None]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, bool], None]


def select(call: Call) -> Selection:
    """Select the provider of attention for ``call``; ``call.settings.attention`` forces one.

    Raises:
        ValueError: the name is unknown, or the forced provider can't run, and why.
    """
    if call.seq_len <= SHORT:
        order, preference = ("triton", "flash_attn", "sdpa"), f"comes first up to {SHORT} tokens"
    else:
        order, preference = ("flash_attn", "sdpa", "triton"), f"comes first beyond {SHORT} tokens"
    obstacles = {name: PROVIDERS[name].unsupported(call) for name in order}
    return select_by("attention", call.settings.attention, obstacles, preference)


def _heads(packed: Tensor, n_heads: int) -> Tensor:
    """[B, S, 3D] as a view [3, B, S, H, head_dim]."""
    B, S, _ = packed.shape
    return packed.view(B, S, 3, n_heads, -1).permute(2, 0, 1, 3, 4)


def _flash_unsupported(call: Call) -> str | None:
    """Why no build of FlashAttention can run ``call``, or None."""
    if call.settings.precision == "fp32":
        return "it multiplies bf16 and fp16 only, not fp32"
    if call.device.type != "cuda" or torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return f"it needs compute capability {MIN_CAPABILITY}, this GPU has {capability}"
    return None


# --- flash-attn (Dao-AILab/flash-attention, flash_attn/flash_attn_interface.py)


@functools.cache
def _flash_attn_load_error() -> str | None:
    try:
        import flash_attn
        import flash_attn.flash_attn_interface  # noqa: F401  # tried, and called below
    except ModuleNotFoundError as error:
        if error.name == "flash_attn":
            return "flash-attn is not installed (pip install flash-attn --no-build-isolation)"
        return f"flash-attn does not load: {error}"
    except (ImportError, OSError) as error:  # built for another torch, say
        return f"flash-attn does not load: {error}"
    if TorchVersion(flash_attn.__version__) < MIN_FLASH_ATTN:
        return f"flash-attn is {flash_attn.__version__}; {MIN_FLASH_ATTN} or later is needed"
    return None


def _flash_attn_unsupported(call: Call) -> str | None:
    if call.device.type != "cuda":
        return f"tensors are on {call.device.type}"
    return _flash_unsupported(call) or _flash_attn_load_error()


def _settings(qkv: Tensor, n_heads: int, causal: bool) -> dict:
    """Arguments that flash-attn's forward and backward share; a window of (-1, -1) is none."""
    head_dim = qkv.shape[-1] // (3 * n_heads)
    return {
        "dropout_p": 0.0, "softmax_scale": 1 / math.sqrt(head_dim), "causal": causal,
        "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None,
    }  # fmt: skip


def _flash_attn_forward(qkv: Tensor, out: Tensor, lse: Tensor, n_heads: int, causal: bool) -> None:
    from flash_attn import flash_attn_interface as flash

    q, k, v = _heads(qkv, n_heads)
    result, log_sum_exp, *_ = flash._flash_attn_forward(
        q, k, v, **_settings(qkv, n_heads, causal), return_softmax=False
    )
    out.view(result.shape).copy_(result)
    lse.copy_(log_sum_exp)


def _flash_attn_backward(
    qkv: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_qkv: Tensor, n_heads: int, causal: bool
) -> None:
    from flash_attn import flash_attn_interface as flash

    q, k, v = _heads(qkv, n_heads)
    d_q, d_k, d_v = _heads(d_qkv, n_heads)  # views: filled in place
    flash._flash_attn_backward(
        d_out.view(q.shape), q, k, v, out.view(q.shape), lse, d_q, d_k, d_v,
        **_settings(qkv, n_heads, causal),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip


# --- PyTorch: the ops that scaled_dot_product_attention itself ends in


def _sdpa_unsupported(call: Call) -> str | None:
    if call.device.type == "cuda" and not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without flash attention"
    if call.device.type == "cuda" and not torch.backends.cuda.flash_sdp_enabled():
        return "it is switched off: torch.backends.cuda.enable_flash_sdp(True)"
    return _flash_unsupported(call)


def _sdpa_forward(qkv: Tensor, out: Tensor, lse: Tensor, n_heads: int, causal: bool) -> None:
    q, k, v = _heads(qkv, n_heads).transpose(2, 3)
    on_cpu = qkv.device.type == "cpu"  # in Triton's interpreter
    aten = torch.ops.aten
    attend = (
        aten._scaled_dot_product_flash_attention_for_cpu
        if on_cpu
        else aten._scaled_dot_product_flash_attention
    )
    result, log_sum_exp, *_ = attend(q, k, v, is_causal=causal)  # [B, H, S, head_dim], [B, H, S]
    result = result.transpose(1, 2)
    out.view(result.shape).copy_(result)
    lse.copy_(log_sum_exp)


def _sdpa_backward(
    qkv: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, d_qkv: Tensor, n_heads: int, causal: bool
) -> None:
    q, k, v = _heads(qkv, n_heads).transpose(2, 3)
    B, H, S, head_dim = q.shape
    out, d_out = (x.view(B, S, H, head_dim).transpose(1, 2) for x in (out, d_out))
    aten = torch.ops.aten
    if qkv.device.type == "cpu":
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, causal
        )
    else:
        no_seed = torch.empty(0, dtype=torch.int64, device=qkv.device)  # no dropout to repeat
        gradients = aten._scaled_dot_product_flash_attention_backward(
            d_out, q, k, v, out, lse, None, None, S, S, 0.0, causal, no_seed, no_seed
        )
    gradients = [gradient.transpose(1, 2) for gradient in gradients]
    torch.stack(gradients, dim=2, out=d_qkv.view(B, S, 3, H, head_dim))


PROVIDERS = {
    "flash_attn": Provider(_flash_attn_unsupported, _flash_attn_forward, _flash_attn_backward),
    "sdpa": Provider(_sdpa_unsupported, _sdpa_forward, _sdpa_backward),
    "triton": Provider(lambda call: None, attention.forward, attention.backward),
}
