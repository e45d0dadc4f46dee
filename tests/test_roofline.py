"""The roofline's counted work against hand formulas, and its rule for time."""

import pytest

pytest.importorskip("triton")

from benchmarks import roofline
from benchmarks.cases import Case
from benchmarks.roofline import Work
from looped_fast.kernels.tuning import candidates

D, ROWS, HEADS = 64, 128, 4
ARCH = "sm_80"


def whole(kernel: str) -> Work:
    """The form of a rows' kernel that does most: a block's end and the next one's begin."""
    works = roofline.row_work(D, ROWS, ARCH)
    return max((w for w in works.values() if w.name == kernel), key=lambda w: w.touched)


def test_products_of_the_rows_kernels_are_those_of_the_formulas() -> None:
    # D^2 per row: 1 of attention's output, 4 + 4 of the MLP, 3 of queries, keys and values;
    # the backward computes the hidden units (4) again
    assert whole("row_forward_kernel").flops == 2 * ROWS * 12 * D**2
    assert whole("row_backward_kernel").flops == 2 * ROWS * (12 + 4) * D**2


def test_memory_of_the_rows_forward_is_its_tensors() -> None:
    fp32, bf16 = 4 * ROWS * D, 2 * ROWS * D
    residual_state_and_shift = 3 * fp32
    activations = bf16 * (1 + 1 + 1 + 1 + 3)  # attention, xhat2, xhatf, xhat1, qkv
    statistics = 3 * 4 * ROWS
    weights = 2 * 12 * D**2 + 4 * 9 * D + 2 * 4 * D
    counted = whole("row_forward_kernel")
    assert counted.touched == residual_state_and_shift + activations + statistics + weights
    assert counted.moved > counted.touched  # every program loads the weights


@pytest.mark.parametrize("seq_len", [10, 82])
def test_attention_multiplies_the_tiles_that_the_causal_mask_leaves(seq_len: int) -> None:
    works = {w.name: w for w in roofline.attention_work(D, HEADS, seq_len, ARCH).values()}
    config = candidates("attention_forward_kernel", ARCH, D // HEADS, "bf16")[0]
    rows, columns = config.rows, config.columns
    tiles = 0
    for first in range(0, seq_len, rows):
        tiles += -(-min(first + rows, seq_len) // columns)
    # scores and values, each 2 operations by rows, columns and head_dim
    forward = works["attention_forward_kernel"]
    assert forward.flops == HEADS * tiles * 2 * 2 * rows * columns * (D // HEADS)
    assert forward.touched >= 4 * 2 * seq_len * D  # q, k, v and the output


def test_a_window_in_several_chunks_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(batch=2, n_points=16, n_loops=5, window=3, n_embd=D, n_head=HEADS)
    whole_window = sum(w.flops for w in roofline.fused(case, ARCH))
    monkeypatch.setattr(roofline.backward, "steps_per_chunk", lambda xhat1, window: 1)
    assert sum(w.flops for w in roofline.fused(case, ARCH)) == whole_window


def test_launches_of_a_training_step() -> None:
    case = Case(batch=2, n_points=16, n_loops=5, window=3, n_embd=D, n_head=HEADS)
    works = roofline.fused(case, ARCH)
    kernels = [w for w in works if w.name.endswith("_kernel")]
    assert sum(w.name == "attention_forward_kernel" for w in kernels) == 5
    assert sum(w.name == "attention_backward_kernel" for w in kernels) == 3
    # the weights' gradients: all rows of all steps of the window in one product for each weight
    products = sum(w.flops for w in works if w.name.startswith("mm"))
    assert products == 2 * 3 * 64 * 12 * D**2


def test_plain_pytorch_is_counted_op_by_op() -> None:
    def launches(n_loops: int, window: int) -> list[Work]:
        case = Case(2, 4, n_loops, window, n_embd=D, n_head=HEADS)
        return roofline.eager(case, "fp32")

    few, many = launches(3, 1), launches(4, 1)
    step = many[: len(many) - len(few)]
    names = [w.name for w in step]
    assert len(many) - len(few) == 13  # 4 linear, 3 norms, attention, GELU, 4 additions
    linear = sum(w.flops for w in step if w.name.startswith(("addmm", "mm")))
    assert linear == 2 * 16 * 12 * D**2
    assert sum("layer_norm" in name for name in names) == 3
    assert len(launches(3, 2)) - len(few) > 13


def test_a_kernel_takes_as_long_as_what_it_waits_for() -> None:
    gpu = roofline.GPUS[0]

    def seconds(**work: float) -> float:
        return roofline.seconds(Work("kernel", **work), gpu, start=1e-6)

    assert seconds() == 1e-6
    assert seconds(flops=gpu.flops) == pytest.approx(1 / roofline.REACHED)
    assert seconds(touched=gpu.bandwidth) == pytest.approx(1 / roofline.REACHED)
    assert seconds(moved=gpu.bandwidth) < seconds(touched=gpu.bandwidth)
    full, spilled = (
        seconds(flops=gpu.flops * n / gpu.processors, programs=n)
        for n in (gpu.processors, gpu.processors + 1)
    )
    assert spilled == pytest.approx(2 * full)


def test_the_table_says_that_it_is_a_prediction(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline, "GPUS", roofline.GPUS[:1])
    small = Case(batch=2, n_points=16, n_loops=3, window=2, n_embd=D, n_head=HEADS)
    monkeypatch.setattr(roofline, "CASES", {"lr": small, "dt": small})
    assert roofline.main() == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Prediction, ")
    assert roofline.GPUS[0].name in printed
