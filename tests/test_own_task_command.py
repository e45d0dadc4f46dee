"""A task of the user's own from training to evaluation, and code that a file must not run."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from looped_fast import LoopedTransformer, evaluate, train
from looped_fast.pretrained import __main__ as release
from looped_fast.pretrained import load_run
from looped_fast.tasks import allow_task_import
from looped_fast.training import checkpoint
from looped_fast.training.config import TrainConfig
from looped_fast.training.log import read_metrics
from looped_fast.training.presets import preset_config

pytestmark = pytest.mark.usefixtures("no_plot")

HERE = Path(__file__).parent / "tasks"  # of polynomials.py, which docs/tasks.md shows
POLYNOMIALS = ["--task", "polynomials:Polynomials", "--task.degree", "2"]
MINI = [
    *("--preset", "tiny", "--n-dims", "2", "--n-embd", "32", "--n-head", "2"),
    *("--batch-size", "4", "--n-points", "9", "--n-positions", "9", "--n-loops", "3"),
    *("--window", "2", "--eval-prompts", "8", "--steps", "6", "--save-every", "2"),
]
QUICK = ["--prompts", "20", "--loop-prompts", "20", "--max-loops", "3", "--loops", "3"]

KILLED = textwrap.dedent("""
    import os, signal, sys
    from looped_fast.train import main
    from looped_fast.training.trainer import Trainer

    training_step = Trainer.training_step

    def dying(self):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        training_step(self)

    Trainer.training_step = dying
    main(sys.argv[1:])
""")


def python(*args, cwd=HERE):
    """Run Python in ``cwd``; return exit status, standard output and standard error."""
    ended = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, cwd=cwd,
        timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return ended.returncode, ended.stdout, ended.stderr


def weights(run):
    return load_file(checkpoint.latest(run) / "model.safetensors")


@pytest.fixture
def in_folder_of_polynomials(monkeypatch):
    monkeypatch.chdir(HERE)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("in_folder_of_polynomials")
def test_an_own_task_trains_resumes_bit_for_bit_and_reloads_in_new_processes(tmp_path, capsys):
    whole, parts, out = (tmp_path / name for name in ("whole", "parts", "out"))
    assert train.main([*MINI, *POLYNOMIALS, "--out", str(whole)]) == 0
    printed = capsys.readouterr().out
    assert "task polynomials:Polynomials, preset tiny, with the settings of lr\n" in printed
    assert "Polynomials, looped, tiny: 6 steps" in printed
    for baseline in ("polynomial fit", "least squares", "zero"):
        assert f"\n{baseline}" in printed
    status, _, errors = python("-c", KILLED, *MINI, *POLYNOMIALS, "--out", parts)
    assert status == -9, errors
    assert checkpoint.load(checkpoint.latest(parts)).step == 4
    resume = ("-m", "looped_fast.train", "--resume", parts)
    status, printed, errors = python(*resume, *POLYNOMIALS)
    assert status == 0, errors
    assert f"continuing {parts} from step 4\n" in printed
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(parts)[name], tensor), name
    command = ("-m", "looped_fast.evaluate", parts, *QUICK, "--out", out)
    status, printed, errors = python(*command, "--allow-task-import")
    assert status == 0, errors
    found = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert found["task"] == "Polynomials(n_dims=2, degree=2)"
    positions = found["positions"]
    assert positions.keys() == {
        "parts", "least squares", "3-nearest neighbours", "averaging", "polynomial fit",
    }  # fmt: skip
    assert positions["polynomial fit"]["mean"][-1] < 1e-3
    assert positions["parts"]["mean"][-1] > 0.01


def test_the_console_script_imports_from_the_working_directory(tmp_path):
    """Its ``sys.path`` starts with the script's folder, where ``python -m`` has this one."""
    script = tmp_path / "looped-fast"
    script.write_text(
        "import sys\nfrom looped_fast.__main__ import main\nsys.exit(main())\n", encoding="utf-8"
    )
    status, printed, errors = python(script, "train", *POLYNOMIALS, "--help")
    assert status == 0, errors
    assert "--task.degree" in printed
    assert "(default: 2)" in printed


def test_help_lists_the_options_of_the_task(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    for task, option in (
        ("dt", "--task.depth INT"),
        ("fourier", "--task.period FLOAT"),
        ("mixture", "--task.second-options.depth INT"),
    ):
        with pytest.raises(SystemExit) as stop:
            train.main(["--preset", "tiny", "--task", task, "--help"])
        assert stop.value.code == 0
        printed = capsys.readouterr().out
        assert option in printed
        assert "task_options" not in printed
        assert "task-options" not in printed


def test_options_of_a_mixture_are_flags(tmp_path, capsys):
    line = ["--task", "mixture", "--task.second", "fourier", "--task.share", "0.25"]
    line += ["--task.second-options.period", "4", "--task.second_options.frequencies=2"]
    assert train.main([*MINI, *line, "--steps", "1", "--out", str(tmp_path / "run")]) == 0
    run = load_run(tmp_path / "run")
    assert run.task.options == {
        "first": "lr", "second": "fourier", "share": 0.25, "first_options": {},
        "second_options": {"frequencies": 2, "period": 4.0},
    }  # fmt: skip
    assert "continuing" not in capsys.readouterr().out
    again = ["--resume", str(tmp_path / "run"), "--steps", "2", "--task.second-options.period", "5"]
    assert train.main(again) == 0
    printed = capsys.readouterr().out
    assert "changed: task.second_options.period 4.0 -> 5.0, steps 1 -> 2" in printed
    frequencies = load_run(tmp_path / "run").task.options["second_options"]["frequencies"]
    assert frequencies == 2


def test_options_fit_the_width_that_the_same_command_or_file_gives(tmp_path):
    line = ["--preset", "tiny", "--task", "sparse_lr", "--n-dims", "9", "--task.sparsity", "8"]
    assert train.parse(line)[0].settings.make_task().sparsity == 8
    line = ["--preset", "tiny", "--task", "sparse_lr", "--n_dims=2", "--task.sparsity=1"]
    assert train.parse(line)[0].settings.n_dims == 2
    with pytest.raises(ValueError, match="sparsity = 3 exceeds n_dims = 2"):
        train.parse(line[:-1])
    file = tmp_path / "mine.yaml"
    file.write_text("preset: tiny\nn_dims: 9\ntask: {name: sparse_lr, sparsity: 8}\n")
    assert train.parse(["--config", str(file)])[0].settings.make_task().sparsity == 8
    line = ["--config", str(file), "--n-dims", "12", "--task.sparsity", "11"]
    assert train.parse(line)[0].settings.make_task().sparsity == 11


def test_a_model_card_has_the_command_that_repeats_the_run(effect):
    with allow_task_import():
        options = {"scale": 3.0, "halve": True}
        config = preset_config("tiny", NAME, n_dims=3, task_options=options)
        words = release.command(dataclasses.replace(config, recompute=True, steps=7))
    assert words[:7] == ["python", "-m", "looped_fast.train", "--preset", "tiny", "--task", NAME]
    assert train.parse(words[3:])[0].settings == dataclasses.replace(
        config, recompute=True, steps=7
    )
    config = preset_config("small", "mixture", task_options={"second_options": {"depth": 3}})
    assert train.parse(release.command(config)[3:])[0].settings == config


# --- what a file must not do ----------------------------------------------------------------------

NAME = "module_of_effect:Mine"


@pytest.fixture
def effect(tmp_path, monkeypatch):
    """The file that ``module_of_effect`` writes when it is imported, from the working folder."""
    file = tmp_path / "effect"
    (tmp_path / "module_of_effect.py").write_text(
        f"open({str(file)!r}, 'a').write('!')\n"
        f"from dataclasses import dataclass\n"
        f"from looped_fast.tasks import LinearRegression\n"
        f"@dataclass(frozen=True)\n"
        f"class Mine(LinearRegression):\n"
        f"    scale: float\n"
        f"    halve: bool = False\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield file
    sys.modules.pop("module_of_effect", None)


@pytest.fixture
def hostile(tmp_path, effect):
    """A run whose checkpoint names that module, made without importing it."""
    config = TrainConfig(
        n_dims=2, n_points=5, n_positions=9, n_embd=16, n_head=2, n_loops=2, window=1, steps=8,
        batch_size=2, eval_prompts=8,
    )  # fmt: skip
    settings = {**config.to_dict(), "task": {"name": NAME, "scale": 2.0}}
    model = LoopedTransformer(config.model_config())
    optimizer = torch.optim.Adam(model.parameters())
    loss = model.loss(torch.randn(2, 5, 2), torch.randn(2, 5))
    loss.backward()
    optimizer.step()
    checkpoint.save(tmp_path / "run", 4, model, optimizer, config=settings)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return tmp_path / "run"


COMMANDS = {
    "resume": (train, ["--resume", "run"]),
    "config": (train, ["--config", "mine.yaml", "--steps", "1", "--out", "new"]),
    "evaluate": (evaluate, ["run", *QUICK, "--out", "out"]),
    "release": (release, ["run", "--cpu-minutes", "1", "--how", "so"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_names_a_module_does_not_get_it_imported(hostile, effect, command, capsys):
    module, args = COMMANDS[command]
    assert module.main(args) == 2
    assert not effect.exists()
    assert "module_of_effect" not in sys.modules
    error = capsys.readouterr().err
    assert f"task {NAME!r} is defined in module module_of_effect, which is not imported" in error
    assert "give --allow-task-import" in error
    assert ("mine.yaml" if command == "config" else "checkpoint.json") in error


@pytest.mark.parametrize("command", ["resume", "config", "evaluate"])
def test_with_the_users_word_it_is_imported(hostile, effect, command, capsys):
    module, args = COMMANDS[command]
    assert module.main([*args, "--allow-task-import"]) == 0, capsys.readouterr().err
    assert effect.read_text() == "!"


def test_a_module_that_the_user_imported_or_named_is_taken(hostile, effect, capsys):
    with pytest.raises(ValueError, match="is not imported"):
        load_run(hostile)
    assert not effect.exists()
    assert train.main(["--resume", "run", "--steps", "5", "--task", NAME]) == 0
    assert "changed: steps 8 -> 5" in capsys.readouterr().out
    assert load_run(hostile).task.options == {"scale": 2.0, "halve": False}
    del sys.modules["module_of_effect"]
    with allow_task_import():
        assert load_run(hostile).task.scale == 2.0


def test_a_required_option_is_a_flag(effect, tmp_path, capsys):
    line = [*MINI, "--task", NAME, "--steps", "1", "--out", str(tmp_path / "new")]
    assert train.main(line) == 2
    assert "needs a value of its option scale, which has no default; give --task.scale" in (
        capsys.readouterr().err
    )
    assert train.main([*line, "--task.scale", "x"]) == 2
    assert "task.scale = 'x': float is needed" in capsys.readouterr().err
    assert train.main([*line, "--task.scale", "1e-1"]) == 0
    assert load_run(tmp_path / "new").task.scale == 0.1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("module_of_none:Mine", "there is no module module_of_none; start from the folder"),
        ("module_of_effect:Min", "has no Min; the tasks there are Mine"),
        ("module_of_effect:open", "module module_of_effect has no open"),
        ("module_of_effect:dataclass", "is no Task but a function; name a subclass of"),
        ("json:JSONDecoder", "is no Task but class JSONDecoder"),
        ("module_of_effect.Mine", "write module_of_effect:Mine"),
    ],
)
@pytest.mark.usefixtures("effect")
def test_a_path_that_leads_to_no_task_is_refused(name, message, capsys):
    assert train.main(["--task", name, "--preset", "tiny"]) == 2
    assert message in capsys.readouterr().err


def test_folders_of_runs_have_the_short_name(effect, tmp_path):
    line = [*MINI, "--task", NAME, "--task.scale", "1", "--steps", "1"]
    assert train.main(line) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("Mine-looped-tiny-")
    assert read_metrics(run / "metrics.jsonl")
