"""The choice of a kernel's configuration, with a fake GPU and timer."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from looped_fast.kernels import tuning
from looped_fast.kernels.attention import attention_backward_kernel, attention_forward_kernel
from looped_fast.kernels.row_forward import row_forward_kernel
from looped_fast.kernels.tuning import Config

CUDA = torch.device("cuda")
FAST = Config(64, 64, 64, num_warps=8)
OPTIONS = (Config(16), FAST, Config(32))


@dataclass
class Gpu:
    """A GPU as far as ``choose`` can tell: FAST is fastest on it."""

    monkeypatch: pytest.MonkeyPatch
    capturing: bool = False
    ran: list[Config] = field(default_factory=list)

    def choose(self, n_rows: int = 5248, precision: str = "bf16") -> Config:
        return tuning.choose(
            row_forward_kernel, width=256, precision=precision, n_rows=n_rows, device=CUDA,
            run=self.ran.append,
        )  # fmt: skip

    def milliseconds(self, run) -> float:
        run()
        return 1.0 if self.ran[-1] == FAST else 2.0

    def new_process(self) -> None:
        self.monkeypatch.setattr(tuning, "_chosen", {})
        self.ran.clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    made = Gpu(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_milliseconds", made.milliseconds)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "candidates", lambda *args: OPTIONS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary 9000")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    torch.use_deterministic_algorithms(False)  # conftest.py poisons memory through it
    return made


def test_the_fastest_is_chosen_and_timed_once(gpu: Gpu) -> None:
    assert gpu.choose() == FAST
    assert gpu.ran == list(OPTIONS)
    assert gpu.choose(n_rows=8192) == FAST  # the same power of two
    assert len(gpu.ran) == len(OPTIONS)
    gpu.choose(n_rows=8193)
    gpu.choose(precision="fp16")
    assert len(gpu.ran) == 3 * len(OPTIONS)


def test_a_choice_outlives_the_process(gpu: Gpu) -> None:
    gpu.choose()
    gpu.new_process()
    assert gpu.choose() == FAST
    assert gpu.ran == []
    (key,) = json.loads(tuning.cache_file().read_text())
    assert "Imaginary 9000" in key
    assert tuning.source_hash(row_forward_kernel) in key


def test_another_gpu_chooses_anew(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.choose()
    gpu.new_process()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary 9001")
    gpu.choose()
    assert gpu.ran == list(OPTIONS)


@pytest.mark.parametrize("content", ["not JSON", "[]", '{"key": 3}', '{"key": {"rows": 3}}'])
def test_a_damaged_cache_is_tuned_afresh(gpu: Gpu, content: str) -> None:
    tuning.cache_file().parent.mkdir()
    tuning.cache_file().write_text(content)
    assert gpu.choose() == FAST
    gpu.new_process()
    assert gpu.choose() == FAST
    assert gpu.ran == []


def test_nothing_is_timed_while_a_graph_is_captured(gpu: Gpu) -> None:
    gpu.capturing = True
    assert gpu.choose() == OPTIONS[0]
    gpu.capturing = False
    assert gpu.choose() == FAST
    gpu.capturing = True
    gpu.ran.clear()
    assert gpu.choose() == FAST
    assert gpu.ran == []


def test_deterministic_runs_take_the_first_candidate(gpu: Gpu) -> None:
    gpu.choose()
    torch.use_deterministic_algorithms(True)
    assert gpu.choose() == OPTIONS[0]


def test_a_cpu_takes_the_first_candidate_without_running_it() -> None:
    ran: list[Config] = []
    config = tuning.choose(
        row_forward_kernel, width=64, precision="fp32", n_rows=20, device=torch.device("cpu"),
        run=ran.append,
    )  # fmt: skip
    assert config == tuning.candidates("row_forward_kernel", "sm_80", 64, "fp32")[0]
    assert ran == []


@pytest.mark.parametrize("failing", [False, True])
def test_tensors_updated_in_place_are_given_back_as_they_were(failing: bool) -> None:
    x = torch.arange(4.0)

    def run(config: Config) -> None:
        x.add_(1)
        if failing:
            raise RuntimeError("launch failed")

    def milliseconds(run) -> float:
        run()
        return 1.0

    if failing:
        with pytest.raises(RuntimeError, match="launch failed"):
            tuning.fastest(OPTIONS, run, [x], milliseconds)
    else:
        assert tuning.fastest(OPTIONS, run, [x], milliseconds) == OPTIONS[0]
    assert torch.equal(x, torch.arange(4.0))


def test_an_architecture_that_was_not_compiled_for_gets_what_fits_it() -> None:
    def of(arch: str) -> tuple[Config, ...]:
        return tuning.candidates("row_forward_kernel", arch, 256, "bf16")

    assert of("sm_86") == of("sm_89")
    assert of("sm_103") == of("sm_100")
    assert of("sm_199") == of("sm_89")


def test_where_no_configuration_is_good_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {"some_kernel": {"sm_89": {"512 fp32": [], "512 bf16": [[16, 32, 32, 4, 2]]}}}
    monkeypatch.setattr(tuning, "_all_candidates", lambda: known)
    assert tuning.candidates("some_kernel", "sm_89", 512, "bf16") == (Config(16, 32, 32),)
    with pytest.raises(ValueError, match="on sm_89 at width 512 in fp32; use another precision"):
        tuning.candidates("some_kernel", "sm_89", 512, "fp32")


def test_the_source_hash_is_of_the_code_and_what_it_calls() -> None:
    forward = tuning.source_hash(attention_forward_kernel)
    assert forward == tuning.source_hash(attention_forward_kernel)
    assert forward != tuning.source_hash(attention_backward_kernel)
