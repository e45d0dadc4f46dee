"""Which backend runs the loop: decided here, and nowhere else.

A backend can run a call if its ``unsupported`` gives no reason; ``reference`` runs every call.
``auto`` takes the backend that was measured fastest on this GPU (``backend_times``), or else the
first that no rule of ``_slower`` passes over.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from looped_fast.kernels.candidates import operand_precision
from looped_fast.ops import (
    backend_times,
    compiled_backend,
    cpu_engine,
    flops,
    loop_autograd,
    triton_backend,
)
from looped_fast.ops.call import Call
from looped_fast.ops.selection import Selection, select_by


def _reference_runs_all(call: Call) -> None:
    return None


# Backends, in the order of ``config.BACKENDS`` -> why each can't run a call, or None.
UNSUPPORTED: dict[str, Callable[[Call], str | None]] = {
    "triton": triton_backend.unsupported,
    "cpu": cpu_engine.unsupported,
    "compiled": compiled_backend.unsupported,
    "reference": _reference_runs_all,
}

# Width D from which a GPU's fp32 products are predicted to be faster in cuBLAS than in Triton.
# Triton multiplies without tensor cores and loads 3 bytes of shared memory for a multiply-add: a
# third of the peak. cuBLAS comes near the peak, but its 25 launches a step dominate at small D.
# At D = 256 a step of 5248 tokens is predicted to take 0.44 ms in Triton, 0.27 ms in cuBLAS.
CUBLAS_WIDTH = 256


def able(call: Call) -> list[str]:
    """Backends that can run ``call``, in the order that ``auto`` prefers without measured times."""
    return [name for name, unsupported in UNSUPPORTED.items() if unsupported(call) is None]


def select(call: Call) -> Selection:
    """Select as ``explain`` does, and remember it: every call of a model selects a backend.

    Reasons in the result may be those of an earlier call. Raises as ``explain`` does.
    """
    # Not remembered: replays (times may arrive at any moment), calls under a dispatch mode (sizes
    # may be symbolic), and a forced compiler or interpreter on a CPU (it may be switched off).
    forced = call.settings.backend in ("compiled", "triton") and call.device.type == "cpu"
    if forced or call.replayed or _get_current_dispatch_mode() is not None:
        return explain(call)
    return _remembered(call, _surroundings(call.device.type))


@functools.lru_cache(1024)
def _remembered(call: Call, surroundings: tuple[Any, ...]) -> Selection:
    return explain(call)


def _surroundings(device: str) -> tuple[Any, ...]:
    """State that a selection depends on besides the call, and that may change in a process."""
    surroundings = loop_autograd.unsupported(), torch.are_deterministic_algorithms_enabled()
    if device == "cpu":
        return *surroundings, torch._C._get_mkldnn_enabled()
    return (
        *surroundings,
        operand_precision(torch.float32),
        torch.backends.cuda.flash_sdp_enabled(),
        compiled_backend.is_switched_off(),
    )


def explain(call: Call) -> Selection:
    """Select a backend for ``call``; ``call.settings.backend`` forces one.

    Raises:
        ValueError: the backend or ``call.settings.attention`` is unknown, or can't run a call that
            forces it; the message gives the reason.
    """
    settings = call.settings
    # The engine may have to be compiled first, which must not happen if another one is forced.
    unasked = () if settings.backend in ("auto", "cpu") else ("cpu",)
    obstacles = {
        name: None if name in unasked else unsupported(call)
        for name, unsupported in UNSUPPORTED.items()
    }
    flops.register()  # now that backends are loaded
    if settings.backend == "auto":
        slower = _slower(call, [name for name, reason in obstacles.items() if reason is None])
        obstacles = {name: reason or slower.get(name) for name, reason in obstacles.items()}
    selection = select_by("backend", settings.backend, obstacles)
    if selection.chosen == "cpu":
        selection = dataclasses.replace(selection, limit=cpu_engine.thread_limit())
    if selection.chosen == "triton":
        from looped_fast.kernels import providers  # needs Triton

        return dataclasses.replace(selection, attention=providers.select(call))
    if settings.attention != "auto":
        raise ValueError(
            f"attention {settings.attention!r} needs the triton backend: "
            f"{selection.reasons['triton']}. Use attention='auto', or backend='triton'"
        )
    if selection.chosen == "cpu" and settings.precision == "fp32" and _lowers_float32():
        selection.reasons["reference"] += f", {_FULL_FLOAT32}"
    return selection


_FULL_FLOAT32 = (
    "and multiplies in full float32 although torch.set_float32_matmul_precision allows less; "
    "precision='bf16' or torch.autocast is faster"
)


def _lowers_float32() -> bool:
    """True if PyTorch may multiply float32 matrices on the CPU in bf16 or TF32."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)  # since PyTorch 2.9
    if matmul is None:
        return torch.get_float32_matmul_precision() != "highest"
    return matmul.fp32_precision in ("bf16", "tf32")


def select_modules(wanted: str, reasons: Sequence[str]) -> Selection:
    """Select for a model that runs module by module in plain PyTorch, for ``reasons``.

    Raises:
        ValueError: ``wanted`` forces a backend that does not call modules.
    """
    why = f"it does not call modules, and {'; '.join(reasons)}"
    obstacles = {name: None if name == "reference" else why for name in UNSUPPORTED}
    return select_by("backend", wanted, obstacles)


def select_read_in(device: str, dtype: torch.dtype, width: int, backend: str = "auto") -> Selection:
    """Select what embeds a prompt to ``width`` D: a kernel of ``triton``, or else plain PyTorch.

    Raises:
        ValueError: as in ``explain``.
    """
    obstacles = dict.fromkeys(UNSUPPORTED)
    obstacles["triton"] = triton_backend.unsupported_tensors(device, dtype, width)
    if backend == "auto" and device == "cpu":
        obstacles["triton"] = obstacles["triton"] or _INTERPRETED
    return select_by("backend", backend, obstacles)


_INTERPRETED = "interpreted kernels run only when asked for"


def _slower(call: Call, able: list[str]) -> dict[str, str]:
    """Backends that ``auto`` passes over although they are ``able`` to run ``call``, and why.

    Measured times decide where there are any, predictions where there are none.
    """
    slower = {
        "compiled": "it runs when asked for, or on a GPU where a training run measured it faster: "
        "compiling for a new shape takes many seconds"
    }
    if call.device.type != "cpu" and call.settings.attention != "auto":
        return slower  # only the triton backend has a choice of attention
    for name, reason in backend_times.failures(call).items():
        if name != "reference":  # which must remain to fall back on
            slower[name] = f"it failed when it was measured: {reason}"
    times = {name: t for name, t in backend_times.lookup(call).items() if name in able}
    if times:
        fastest = min(times, key=times.__getitem__)
        what = "a training step" if call.training else "an inference call"
        for name, milliseconds in times.items():
            slower[name] = (
                f"{milliseconds:.3g} ms {what} measured here, {fastest} takes {times[fastest]:.3g}"
            )
        slower.pop(fastest)
    elif call.device.type == "cpu":
        slower["triton"] = _INTERPRETED
    elif backend_times.operands(call) == "fp32" and call.n_embd >= CUBLAS_WIDTH:
        slower["triton"] = (
            f"predicted slower than cuBLAS in fp32 at D = {call.n_embd} (from {CUBLAS_WIDTH}); "
            f"backend='triton' forces it, and precision='bf16' or TF32 uses tensor cores"
        )
    return slower
