"""Several processes that train one model, as torchrun starts them."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import held_elsewhere, relative_error
from safetensors.torch import load_file

from looped_fast import LoopedTransformer
from looped_fast.paper import reproduce
from looped_fast.tasks import sample_batch
from looped_fast.train import main
from looped_fast.training import checkpoint
from looped_fast.training.config import CurriculumConfig, TrainConfig, config_from_dict
from looped_fast.training.distributed import Processes
from looped_fast.training.log import read_metrics
from looped_fast.training.presets import preset_config
from looped_fast.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
N_PROCESSES = 3  # sums over two would have the same bits in any order
STEPS = 6
MINI = [
    *("--preset", "tiny", "--n-embd", "32", "--n-head", "2", "--batch-size", "4"),
    *("--n-points", "6", "--n-positions", "6", "--n-loops", "3", "--window", "2"),
    *("--curriculum.dims.interval", "2", "--curriculum.loops.start", "2"),
    *("--curriculum.loops.interval", "4", "--warmup-steps", "0", "--lr-decay", "none"),
    *("--eval-prompts", "8", "--log-every", "1", "--eval-every", "4", "--save-every", "100"),
    *("--steps", str(STEPS), "--device", "cpu", "--backend", "reference"),
]


# torchrun's agent with forks, since importing PyTorch in each process takes longer than training.
# ``work`` is a statement that a process executes before it trains.
FORKING = """
    import sys, uuid
    import matplotlib.figure, torch._dynamo, torch.utils.tensorboard  # as training does
    from looped_fast import train
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def process(*args):
        exec(work, {})
        sys.exit(train.main(args))

    n_processes, work, *args = sys.argv[1:]
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=int(n_processes), run_id=str(uuid.uuid4()),
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0, start_method="fork",
    )
    elastic_launch(config, process)(*args)
"""


def torchrun(folder, *args, n_processes=N_PROCESSES, forked=None):
    """Run torchrun in ``folder``; return exit status, standard output and standard error.

    ``forked`` is Python for every process to execute before it trains; see ``FORKING``.
    """
    if forked is None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n_processes]
        launcher += ["-m", "looped_fast.train"]
    else:
        launcher = ["-c", textwrap.dedent(FORKING), n_processes, textwrap.dedent(forked)]
    process = subprocess.Popen(
        [sys.executable, *map(str, (*launcher, *args))],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        printed, errors = process.communicate(timeout=60)
    finally:
        process.terminate()  # torchrun then ends its processes, too
        process.wait(60)
    return process.returncode, printed, errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and output of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    status, printed, errors = torchrun(folder, *MINI)
    assert status == 0, errors
    return folder, printed


def run_of(folder):
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def weights(run_dir):
    return load_file(checkpoint.latest(run_dir) / "model.safetensors")


def trained_on_all_batches(config, dtype):
    """Losses and parameters of plain training on the joined batches of all ranks."""
    torch.manual_seed(config.seed)
    model = LoopedTransformer(config.model_config(), backend="reference").to(dtype)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, (0.9, config.beta2))
    losses = []
    for step in range(config.steps):
        n_dims, n_points, n_loops = config.make_curriculum().at(step)
        batches = [
            sample_batch(
                config.make_task(), config.batch_size, n_points,
                seed=config.seed, step=step, rank=rank, n_dims=n_dims,
            )
            for rank in range(N_PROCESSES)
        ]  # fmt: skip
        xs, ys = (torch.cat(each).to(dtype) for each in zip(*batches, strict=True))
        loss = (model(xs, ys, n_loops, config.window) - ys).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64), flat(model.state_dict())


def flat(state):
    """All parameters but the biases of keys, whose gradient is 0: Adam scales its rounding errors
    to noise."""
    state = {name: tensor.clone() for name, tensor in state.items()}
    for name, tensor in state.items():
        if name.endswith("c_attn.bias"):
            tensor.chunk(3)[1].zero_()
    return torch.cat([state[name].flatten() for name in sorted(state)])


def test_several_processes_train_as_one_on_all_their_batches(whole):
    run_dir = run_of(whole[0])
    saved = checkpoint.load(checkpoint.latest(run_dir))
    config = config_from_dict(saved.config, TrainConfig())
    exact_losses, exact = trained_on_all_batches(config, torch.float64)
    plain_losses, plain = trained_on_all_batches(config, torch.float32)
    ours = flat(saved.model_state)
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if "loss" in line]
    losses = torch.tensor([line["loss"] for line in lines], dtype=torch.float64)
    rounding = 4 * torch.finfo(torch.float32).eps
    assert relative_error(ours, exact) < 3 * relative_error(plain, exact) + rounding
    assert relative_error(losses, exact_losses) < (
        3 * relative_error(plain_losses, exact_losses) + rounding
    )


def test_only_the_main_process_writes_and_prints(whole):
    folder, printed = whole
    run_dir = run_of(folder)  # the only one
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "errors" in line] == [4, 6]
    for line in lines[:3]:
        tokens = N_PROCESSES * 4 * 2 * 6
        assert line["tokens_per_s"] == pytest.approx(line["steps_per_s"] * tokens)
    assert len(list((run_dir / "tensorboard").iterdir())) == 1
    assert (run_dir / "report.png").exists()
    for once in ("estimated time", "held-out prompts", "least squares", "weights:"):
        assert printed.count(once) == 1, once
    assert f"{N_PROCESSES} processes, 4 prompts each: 12 in a step" in printed


# Step 2: one process gets a signal. Step 4, after resuming: torchrun gets one, as from its user.
STOPPED = """
    import os, signal, time
    from looped_fast.training.trainer import Trainer

    training_step = Trainer.training_step

    def stopped(self):
        if self.step in (2, 4) and self.processes.rank == 1:
            os.kill(os.getpid() if self.step == 2 else os.getppid(), signal.SIGTERM)
            while not self._signal:
                time.sleep(0.01)
        training_step(self)

    Trainer.training_step = stopped
"""


@pytest.mark.slow
def test_stopped_twice_and_resumed_they_end_bit_identical(tmp_path, whole, capsys):
    out = tmp_path / "run"
    for args, steps in [((*MINI, "--out", out), 3), (("--resume", out), 5)]:
        status, printed, errors = torchrun(tmp_path, *args, forked=STOPPED)
        assert status != 0
        assert checkpoint.load(checkpoint.latest(out)).step == steps, errors
        message = f"SIGTERM: step {steps} is finished and saved. Continue with\n  torchrun ... -m"
        assert printed.count(message) == 1
        assert "rror:" not in errors.replace("ChildFailedError:", "")
    status, printed, errors = torchrun(tmp_path, "--resume", out, forked="")
    assert status == 0, errors
    assert "processes" not in printed.splitlines()[0]
    expected = weights(run_of(whole[0]))
    ours = weights(out)
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name
    lines = read_metrics(out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]

    assert main(["--resume", str(out), "--steps", str(STEPS + 1)]) == 0
    origin = capsys.readouterr().out.splitlines()[0]
    assert f"processes {N_PROCESSES} -> 1, and with them the batches" in origin


# --- failures -------------------------------------------------------------------------------------


def test_a_bad_setting_ends_all_and_is_printed_once(tmp_path):
    args = ("--backend", "nosuch", "--out", tmp_path / "run")
    status, printed, errors = torchrun(tmp_path, *MINI, *args, forked="", n_processes=2)
    assert status != 0
    assert errors.count("error: unknown backend 'nosuch'") == 1
    assert not printed
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_ends_all_and_is_printed_once(tmp_path):
    out = tmp_path / "run"
    with held_elsewhere(out):
        status, _, errors = torchrun(tmp_path, *MINI, "--out", out, forked="", n_processes=2)
        assert status != 0
        assert errors.count(f"error: {out} is in use: process {os.getpid()} on ") == 1
        assert os.listdir(out) == ["run.lock"]


# Only process 1 has this fault, before training.
FAILING = """
    from looped_fast import train
    from looped_fast.training.trainer import Trainer

    class Failing(Trainer):
        def __init__(self, config, run_dir, resume, processes, start):
            super().__init__(config, run_dir, resume, processes, start)
            if processes.rank == 1:
                raise ValueError("no memory is left")

    train.Trainer = Failing
"""


def test_a_fault_of_one_ends_all_and_leaves_no_folder(tmp_path):
    args = (*MINI, "--out", tmp_path / "run")
    status, printed, errors = torchrun(tmp_path, *args, forked=FAILING, n_processes=2)
    assert status != 0
    assert errors.count("error: no memory is left") == 1
    assert "estimated time" not in printed
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_all_at_one_step(tmp_path):
    wild = ("--lr", 1e30, "--clip-grad-norm", None, "--save-every", 1, "--out", tmp_path / "run")
    # The read-in gets no gradient here, which DistributedDataParallel must not wait for.
    unused = ("--injection", "none", "--curriculum.loops.start", None)
    status, _, errors = torchrun(tmp_path, *MINI, *wild, *unused, forked="", n_processes=2)
    assert status != 0
    assert errors.count("No checkpoint was written of it") == 1
    last = checkpoint.load(checkpoint.latest(tmp_path / "run"))
    assert f"at step {last.step + 1}" in errors
    assert all(tensor.isfinite().all() for tensor in last.model_state.values())


# --- single processes -----------------------------------------------------------------------------


def trainer_of(tmp_path, processes, **changes):
    config = dataclasses.replace(
        preset_config("tiny"), n_embd=32, n_head=2, batch_size=4, device="cpu", **changes
    )
    return Trainer(config, tmp_path, processes=processes)


def test_a_single_process_uses_the_same_methods():
    single = Processes()
    assert single.is_main
    assert single.gather(1, 2) == [[1, 2]]
    assert single.mean(1, float("inf")) == [1, float("inf")]
    assert single.broadcast(lambda: "done") == "done"
    with pytest.raises(ValueError, match="its own"), single.failing_together():
        raise ValueError("its own")


def test_fixed_prompts_are_shared_out(tmp_path):
    ranks = [
        trainer_of(tmp_path, Processes(rank, 2), train_prompts=9, curriculum=CurriculumConfig())
        for rank in range(2)
    ]
    rows = []
    for trainer in ranks:
        trainer._set_inputs()
        rows.append(trainer._rows)
    assert len(torch.cat(rows).unique()) == 8
    with pytest.raises(ValueError, match=r"7 training prompts are fewer than a step uses \(8\)"):
        trainer_of(tmp_path, Processes(0, 2), train_prompts=7)


def test_several_processes_use_no_graphs_and_say_so(tmp_path):
    several = Processes(0, 2)
    assert "several processes" in trainer_of(tmp_path, several).graphs.unsupported
    with pytest.raises(ValueError, match="cuda_graphs = 'on', but several processes"):
        trainer_of(tmp_path, several, cuda_graphs="on")


def test_each_process_needs_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    several = Processes(rank=5, world_size=8, local_rank=1)
    assert several.own_device(torch.device("cuda")) == torch.device("cuda:1")
    assert chosen == [1]
    assert several.own_device(torch.device("cpu")) == torch.device("cpu")
    assert Processes().own_device(torch.device("cuda:1")) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:0' is one GPU, and each of the 8 processes"):
        several.own_device(torch.device("cuda:0"))
    with pytest.raises(ValueError, match="LOCAL_RANK = 2, but PyTorch sees 2 CUDA devices"):
        Processes(2, 8, 2).own_device(torch.device("cuda"))


def test_an_environment_without_a_meeting_point_is_an_error(tmp_path, monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*MINI, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "WORLD_SIZE = 2, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set" in error
    assert "start with torchrun" in error
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main([*MINI, "--out", str(tmp_path / "run")]) == 2
    assert "WORLD_SIZE = 'two'" in capsys.readouterr().err


def test_other_commands_refuse_several_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE = 2: of all commands only"):
        Trainer(preset_config("tiny"), tmp_path)
    assert reproduce.main(["--out", str(tmp_path)]) == 2
    assert "start this one without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("resumed", [False, True])
def test_each_process_imports_the_module_of_a_task(tmp_path, monkeypatch, resumed):
    """``--task`` is enough for a new run; a run that is resumed names it, so it needs a word."""
    (tmp_path / "module_of_ranks.py").write_text(
        "from looped_fast.tasks import LinearRegression\nclass Mine(LinearRegression): pass\n"
    )
    args = [*MINI, "--task", "module_of_ranks:Mine", "--out", str(tmp_path / "run")]
    if resumed:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", list(sys.path))
        assert main([*args, "--steps", "2"]) == 0
        del sys.modules["module_of_ranks"]
        args = ["--resume", str(tmp_path / "run"), "--steps", "3", "--allow-task-import"]
    status, printed, errors = torchrun(tmp_path, *args, n_processes=2, forked="pass")
    assert status == 0, errors
    assert "task module_of_ranks:Mine" in printed
