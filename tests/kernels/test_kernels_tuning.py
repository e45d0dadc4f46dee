"""The choice of a kernel's configuration, with a fake GPU and timer."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import NO_TRITON

if NO_TRITON:
    pytest.skip(NO_TRITON, allow_module_level=True)

from looped_fast.kernels import trial, tuning
from looped_fast.kernels.attention import attention_backward_kernel, attention_forward_kernel
from looped_fast.kernels.candidates import Config, candidates, source_hash
from looped_fast.kernels.launch import postponing
from looped_fast.kernels.row_forward import row_forward_kernel

CUDA = torch.device("cuda")  # without an index: the current device
FAST = Config(64, 64, 64, num_warps=8)
OPTIONS = (Config(16), FAST, Config(32))


@dataclass
class Gpu:
    """Two GPUs as far as ``choose`` can tell: FAST is fastest on them."""

    monkeypatch: pytest.MonkeyPatch
    capturing: bool = False
    memory: bool = True
    current: int = 0
    ran: list[Config] = field(default_factory=list)
    ran_on: list[int] = field(default_factory=list)

    def choose(
        self, n_rows: int = 5248, precision: str = "bf16", device: torch.device = CUDA
    ) -> Config:
        return tuning.choose(
            row_forward_kernel, width=256, precision=precision, n_rows=n_rows, device=device,
            run=self.run,
        )  # fmt: skip

    def run(self, config: Config) -> None:
        self.ran.append(config)
        self.ran_on.append(self.current)

    def fastest(self, options, run, precision) -> Config:
        if not self.memory:
            raise trial.NotTimed(options[0], torch.OutOfMemoryError("CUDA out of memory"))
        for config in options:
            run(config)
        return FAST

    @contextlib.contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.current = self.current, index
        yield
        self.current = before

    def new_process(self) -> None:
        self.monkeypatch.setattr(tuning, "_chosen", {})
        self.ran.clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gpu:
    made = Gpu(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(trial, "fastest", made.fastest)
    monkeypatch.setattr(tuning, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tuning, "candidates", lambda *args: OPTIONS)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Imaginary 9000")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: made.capturing)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: made.current)
    monkeypatch.setattr(torch.cuda, "device", made.device)
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
    assert source_hash(row_forward_kernel) in key


def test_a_choice_is_made_on_the_device_of_the_tensors(gpu: Gpu) -> None:
    gpu.choose(device=torch.device("cuda", 1))
    assert gpu.ran_on == [1, 1, 1]
    assert gpu.current == 0
    gpu.current = 1
    gpu.choose()
    assert len(gpu.ran) == 3


def test_other_candidates_are_timed_anew(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.choose()
    gpu.new_process()
    monkeypatch.setattr(tuning, "candidates", lambda *args: (*OPTIONS, Config(64, 32, 32)))
    gpu.choose()
    assert len(gpu.ran) == 4


def test_without_memory_for_a_trial_the_first_is_taken_and_not_kept(gpu: Gpu, caplog) -> None:
    gpu.memory = False
    assert gpu.choose() == OPTIONS[0]
    assert "not timed" in caplog.text
    assert "OutOfMemoryError: CUDA out of memory" in caplog.text
    gpu.memory = True
    gpu.new_process()
    assert gpu.choose() == FAST


def test_a_choice_can_be_postponed(gpu: Gpu) -> None:
    postponed = []
    with postponing(lambda *choice: postponed.append(choice)):
        assert gpu.choose() == OPTIONS[0]
    ((kernel, run_all, choose),) = postponed
    assert kernel is row_forward_kernel
    assert gpu.ran == []
    run_all()
    assert gpu.ran == list(OPTIONS)
    assert choose() == FAST
    with postponing(lambda *choice: pytest.fail("chosen before")):
        assert gpu.choose() == FAST


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


def test_a_single_candidate_needs_no_trial(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "candidates", lambda *args: OPTIONS[:1])
    assert gpu.choose() == OPTIONS[0]
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
    assert config == candidates("row_forward_kernel", "sm_80", 64, "fp32")[0]
    assert ran == []


def test_an_architecture_that_was_not_compiled_for_gets_what_fits_it() -> None:
    def of(arch: str) -> tuple[Config, ...]:
        return candidates("row_forward_kernel", arch, 256, "bf16")

    assert of("sm_86") == of("sm_89")
    assert of("sm_103") == of("sm_100")
    assert of("sm_199") == of("sm_89")


def test_where_no_configuration_is_good_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {"some_kernel": {"sm_89": {"512 fp32": [], "512 bf16": [[16, 32, 32, 4, 2]]}}}
    monkeypatch.setattr("looped_fast.kernels.candidates._all_candidates", lambda: known)
    assert candidates("some_kernel", "sm_89", 512, "bf16") == (Config(16, 32, 32),)
    with pytest.raises(ValueError, match="on sm_89 at width 512 in fp32; use another precision"):
        candidates("some_kernel", "sm_89", 512, "fp32")


def test_the_source_hash_is_of_the_code_and_what_it_calls() -> None:
    forward = source_hash(attention_forward_kernel)
    assert forward == source_hash(attention_forward_kernel)
    assert forward != source_hash(attention_backward_kernel)
