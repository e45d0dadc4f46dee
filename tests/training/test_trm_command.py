"""``train --model trm`` end to end: flags, files, presets, resuming, evaluation and errors."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import yaml

import looped_fast
from looped_fast import evaluate
from looped_fast.model import TinyRecursiveModel
from looped_fast.pretrained import load_run, load_start, load_trm_run
from looped_fast.tasks import sudoku
from looped_fast.tasks.puzzles import PUZZLES
from looped_fast.train import main, parse_early
from looped_fast.training import checkpoint
from looped_fast.training.distributed import Processes
from looped_fast.training.log import read_metrics
from looped_fast.training.trm import command
from looped_fast.training.trm.config import TRMTrainConfig, trm_config, trm_preset
from looped_fast.training.trm.trainer import TRMTrainer

MINI = [
    *("--model", "trm", "--hidden-size", "32", "--num-heads", "2", "--L-cycles", "1"),
    *("--batch-size", "4", "--halt-max-steps", "2", "--eval-puzzles", "4", "--log-every", "1"),
    *("--eval-every", "2", "--save-every", "2", "--device", "cpu", "--backend", "reference"),
]


@pytest.fixture(autouse=True)
def small_pool(monkeypatch):
    monkeypatch.setattr(sudoku, "_TRAINING_POOL", 64)
    sudoku._training_pool.cache_clear()
    yield
    sudoku._training_pool.cache_clear()


def train(*args):
    return main([*MINI, *map(str, args)])


def final(run_dir):
    return checkpoint.load(checkpoint.latest(run_dir))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert train("--steps", 4, "--out", folder) == 0
    return folder


def test_a_run_leaves_settings_numbers_weights_and_a_picture(tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--steps", 4, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "task sudoku4, preset tiny (the default)" in printed
    assert "backend: reference" in printed
    assert "puzzles solved" in printed
    assert "20 unseen puzzles" in printed
    results = json.loads((out / "results.json").read_text())
    assert set(results["accuracy"]) >= {"cells", "solved", "solved_by_q", "steps_by_q"}
    assert yaml.safe_load((out / "config.yaml").read_text())["hidden_size"] == 32
    assert [line["step"] for line in read_metrics(out / "metrics.jsonl")] == [1, 2, 2, 3, 4, 4]
    assert (out / "report.png").stat().st_size > 10_000
    assert (out / "tensorboard").is_dir()
    assert not (out / "run.lock").exists()
    assert final(out).step == 4


def test_a_resumed_run_is_bit_identical_and_says_what_changed(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train("--steps", 5, "--out", whole) == 0
    assert train("--steps", 3, "--out", parts) == 0
    capsys.readouterr()
    assert main(["--resume", str(parts), "--steps", "5"]) == 0  # the run says that it is a trm
    printed = capsys.readouterr().out
    assert f"continuing {parts} from step 3; changed: steps 3 -> 5" in printed
    for kind in ("model_state", "run_state"):
        found, wanted = getattr(final(parts), kind), getattr(final(whole), kind)
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_says_how_to_resume(
    tmp_path, capsys, monkeypatch, signum, status
):
    step = TRMTrainer.training_step

    def interrupted(self):
        if self.step == 2:
            os.kill(os.getpid(), signum)
        step(self)

    monkeypatch.setattr(TRMTrainer, "training_step", interrupted)
    out = tmp_path / "run"
    assert train("--steps", 100, "--save-every", 100, "--out", out) == status
    printed = capsys.readouterr().out
    assert "step 3 is finished and saved" in printed
    assert f"python -m looped_fast.train --resume {out}" in printed
    assert final(out).step == 3


def test_settings_come_from_a_file_too(tmp_path, run_dir, capsys):
    settings = run_dir / "config.yaml"
    assert main(["--config", str(settings), "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert f"settings of {settings}" in capsys.readouterr().out
    before, after = final(run_dir).config, final(tmp_path / "run").config
    others = {"steps", "out", "preset"}
    assert [n for n in before if before[n] != after[n] and n not in others] == []


def test_a_data_set_of_the_public_code_is_trained_on_and_evaluated(tmp_path, monkeypatch, capsys):
    """Mazes, say: no Sudoku, so no grids are drawn; with the public puzzle embedding."""
    monkeypatch.chdir(tmp_path)
    index = {"seq_len": 8, "vocab_size": 6, "num_puzzle_identifiers": 1, "ignore_label_id": 0}
    for part, n in (("train", 30), ("test", 7)):
        folder = tmp_path / "mazes" / part
        folder.mkdir(parents=True)
        tokens = np.random.default_rng(0).integers(1, 6, (n, 8))
        np.save(folder / "all__inputs.npy", tokens)
        np.save(folder / "all__labels.npy", np.sort(tokens))
        (folder / "dataset.json").write_text(json.dumps(index))
    line = ["--task", "mazes", "--preset", "public", "--amp", "off", "--steps", 2]
    assert train(*line, "--puzzle-emb-ndim", 40, "--puzzle-emb-len", 2) == 0
    printed = capsys.readouterr().out
    assert "mazes, trm, public: 2 steps" in printed
    assert "7 unseen puzzles" in printed
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mazes-trm-public-")
    saved = final(folder)
    assert saved.model_state["puzzle_emb.weights"].abs().sum() > 0  # it is trained
    assert saved.run_state["sequences.z_H"].shape == (4, 10, 32)
    assert evaluate.main([str(folder), "--prompts", "20"]) == 0
    results = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert results["runs"][folder.name]["puzzles"] == 7


def test_a_new_run_gets_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("--steps", 1) == 0
    (folder,) = os.listdir("runs")
    assert folder.startswith("sudoku4-trm-tiny-")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "dt"], "unknown task of --model trm 'dt'"),
        (["--task", "sudoku44"], "did you mean 'sudoku4'"),
        (["--preset", "paper"], "unknown preset of trm 'paper'. Valid: public, tiny"),
        (["--n-embd", "64"], "unknown flag --n-embd; did you mean --hidden-size?"),
        (["--n-head", "4"], "did you mean --num-heads?"),
        (["--n-loops", "4"], "did you mean --L-cycles?"),
        (["--amp", "fp16"], "unknown value of --amp, 'fp16'"),
        (["--num-heads", "5"], "hidden_size = 32 is not divisible by num_heads = 5"),
        (["--steps", "0"], "steps = 0: at least 1"),
        (["--eval-puzzles", "0"], "eval_puzzles = 0: at least 1"),
        (["--lr", "-1"], "lr = -1.0: at least 0"),
        (["--ema-rate", "1"], "ema_rate = 1.0: at least 0 and less than 1"),
        (["--halt-exploration-prob", "2"], "halt_exploration_prob = 2.0 is outside 0..1"),
        (["--backend", "cuda"], "unknown backend 'cuda'"),
        (["--device", "gpu"], "device 'gpu'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
    ids=lambda a: "".join(a).strip("-") if isinstance(a, list) else "",
)
def test_bad_settings_exit_2_and_name_value_limit_and_remedy(
    tmp_path, monkeypatch, capsys, args, message
):
    monkeypatch.chdir(tmp_path)
    assert train(*args, "--out", "run") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # the corrected command may use it


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "mine.yaml"], "a resumed run keeps its own settings"),
        (["--preset", "public"], "--preset public is for a new run"),
        (["--steps", "3"], "is at step 4 already; give more steps"),
        (["--batch-size", "5"], "Keep the run's --task, --batch-size and sizes of the model"),
        (["--n-points", "5"], "unknown flag --n-points"),
        (["--model", "looped"], "unknown value of --model, 'looped'. Valid: trm"),
    ],
    ids=lambda a: a[0].strip("-") if isinstance(a, list) else "",
)
def test_what_a_resumed_run_refuses(run_dir, capsys, args, message):
    assert main(["--resume", str(run_dir), "--steps", "6", *args]) in (1, 2)
    assert message in capsys.readouterr().err
    assert final(run_dir).step == 4


def test_a_damaged_checkpoint_is_reported(run_dir, tmp_path, capsys):
    damaged = tmp_path / "run"
    shutil.copytree(run_dir, damaged)
    for path in checkpoint.checkpoints(damaged):
        (path / checkpoint.INDEX).write_text("{")
    assert main(["--resume", str(damaged), "--model", "trm"]) == 1
    assert "checkpoint.json is not JSON" in capsys.readouterr().err


def test_a_folder_that_holds_a_run_is_refused(run_dir, capsys):
    assert train("--out", run_dir) == 2
    assert f"{run_dir} already holds a run; continue it with --resume" in capsys.readouterr().err


@pytest.mark.parametrize("task", list(PUZZLES))
@pytest.mark.parametrize("model", [[], ["--model", "tied"]], ids=["", "tied"])
def test_other_models_say_that_puzzles_are_for_trm(capsys, task, model):
    assert main(["--task", task, *model]) == 2
    assert f"task '{task}' is one of puzzles" in capsys.readouterr().err


def test_an_unknown_model_is_told_of_trm(capsys):
    assert main(["--model", "trn"]) == 2
    assert "did you mean 'trm'? Valid: looped, standard, tied, trm" in capsys.readouterr().err


def test_several_processes_are_refused(tmp_path, monkeypatch):
    line = [*MINI, "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match=r"2 processes: a model trm .* without torchrun"):
        command.main(line, parse_early(line), Processes(1, 2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"WORLD_SIZE = 2"):
        TRMTrainer(trm_preset(), tmp_path)
    assert not (tmp_path / "run").exists()


# ---- presets


@pytest.mark.parametrize("preset", ["tiny", "public"])
@pytest.mark.parametrize("task", list(PUZZLES))
def test_every_preset_builds_and_names_itself(preset, task):
    config = trm_preset(preset, task)
    assert (config.model, config.preset, config.task) == ("trm", preset, task)
    with torch.device("meta"):
        TinyRecursiveModel(config.model_config(config.make_task()))
    assert trm_config(config.to_dict(), TRMTrainConfig()) == config


def test_the_public_preset_has_the_public_values():
    """Source: config/cfg_pretrain.yaml, config/arch/trm.yaml and pretrain_att_sudoku, README."""
    config = trm_preset("public")
    wanted = {
        "hidden_size": 512, "num_heads": 8, "L_layers": 2, "H_cycles": 3, "L_cycles": 6,
        "expansion": 4, "pos_encodings": "rope", "puzzle_emb_ndim": 512, "puzzle_emb_len": 16,
        "halt_max_steps": 16, "halt_exploration_prob": 0.1, "batch_size": 768, "lr": 1e-4,
        "beta2": 0.95, "weight_decay": 1.0, "warmup_steps": 2000, "ema_rate": 0.999, "seed": 0,
        "lr_decay": "none", "amp": "bf16", "steps": 50_000 * 1000 // 768,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in wanted} == wanted


# ---- trained models


def test_a_trained_model_is_loaded_with_its_average(run_dir):
    run = load_trm_run(run_dir, "cpu")
    assert (run.name, run.step, run.config.hidden_size) == ("run", 4, 32)
    saved = final(run_dir).model_state
    assert all(torch.equal(tensor, saved[n]) for n, tensor in run.model.state_dict().items())
    puzzles = run.config.make_task().evaluation_batch(3, 0)
    assert run.model.solve(puzzles.inputs, halt="q").tokens.shape == (3, 16)
    assert load_trm_run(run.path).name == "run-step-00000004"


@pytest.mark.parametrize("load", [looped_fast.from_pretrained, load_run, load_start])
def test_what_loads_other_models_names_what_loads_this_one(run_dir, load):
    with pytest.raises(ValueError, match=r"is a Tiny Recursive Model, .*load_trm_run"):
        load(run_dir)


def test_load_trm_run_refuses_other_models():
    with pytest.raises(ValueError, match=r"lr-small is of no model trm; .*load_run"):
        load_trm_run("lr-small")


def test_a_run_is_evaluated(run_dir, tmp_path, capsys):
    assert evaluate.main([str(run_dir), "--prompts", "20", "--out", str(tmp_path / "out")]) == 0
    assert "puzzles solved" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert results["runs"]["run"]["step"] == 4
    assert results["runs"]["run"]["puzzles"] == 20
    assert 0 <= results["runs"]["run"]["accuracy"]["cells"] <= 1
    assert (tmp_path / "out" / "run.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ood"], "--ood True is for models of function classes"),
        (["--points", "5"], "--points 5 is for models of function classes"),
        (["--baselines", "none"], "--baselines none is for models of function classes"),
        (["lr-small"], "lr-small is of no model trm"),
        (["--prompts", "1"], "prompts = 1: at least"),
    ],
    ids=lambda a: a[0].strip("-") if isinstance(a, list) else "",
)
def test_an_evaluation_refuses_what_is_not_for_puzzles(run_dir, tmp_path, capsys, args, message):
    assert evaluate.main([str(run_dir), *args, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_runs_of_one_name_are_evaluated_apart(run_dir, tmp_path, monkeypatch, capsys):
    assert evaluate.main([str(run_dir)] * 2) == 2
    assert "2 runs are named run; evaluate each in a command" in capsys.readouterr().err
    monkeypatch.chdir(run_dir / "checkpoints")
    one = ["step-00000004", "--prompts", "20", "--out", str(tmp_path)]
    assert evaluate.main(one) == 0
    assert (tmp_path / "run-step-00000004.png").exists()


def test_an_evaluation_of_functions_refuses_puzzles(run_dir, capsys):
    assert evaluate.main(["lr-small", str(run_dir)]) == 2
    assert "is a Tiny Recursive Model" in capsys.readouterr().err


def test_settings_of_a_checkpoint_are_checked(run_dir):
    config = load_trm_run(run_dir).config
    assert dataclasses.replace(config, steps=9).steps == 9
    with pytest.raises(ValueError, match=r"unknown setting 'n_embd'; did you mean 'hidden_size'"):
        trm_config({"n_embd": 3}, config)
    with pytest.raises(ValueError, match=r"lr = 'x'"):
        trm_config({"lr": "x"}, config)
