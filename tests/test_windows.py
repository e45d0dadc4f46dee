"""What Windows does differently, acted on other systems by ``fake_windows``; and file names."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path, PureWindowsPath

import pytest
from fake_windows import forbidden

from looped_fast.ops import compiled_backend
from looped_fast.paper import reproduce
from looped_fast.training import durable
from looped_fast.training.durable import sync_names, when_free

ROOT = Path(__file__).parent.parent
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="acts Windows by means of /proc")


def run_as_on_windows(script: str, *args: object) -> list:
    """Run a script under ``fake_windows``, with cp1252 for output; return the JSON it prints."""
    code = "import fake_windows\nfake_windows.start()\n" + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-c", code, *map(str, args)],
        capture_output=True, encoding="cp1252", timeout=300,
        env={
            **os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests"))),
            "PYTHONIOENCODING": "cp1252", "OMP_NUM_THREADS": "1",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TRAINED = """
    import json, sys
    from pathlib import Path
    from looped_fast import evaluate, train
    from looped_fast.training import checkpoint
    out = Path(sys.argv[1])
    run = out / "λr"
    settings = (
        "--preset tiny --backend reference --device cpu --n-embd 32 --n-head 2 --batch-size 4 "
        "--n-points 6 --n-positions 6 --n-loops 3 --window 2 --eval-prompts 8 --log-every 5 "
        "--save-every 5 --eval-every 5 --keep 1 --steps"
    ).split()
    status = [train.main([*settings, "10", "--out", str(run)])]
    names = [sorted(path.name for path in run.iterdir())]
    status.append(train.main(["--resume", str(run), "--steps", "15"]))
    names.append(sorted(path.name for path in run.iterdir()))
    names.append([path.name for path in checkpoint.checkpoints(run)])
    small = "--baselines none --prompts 20 --loop-prompts 20 --max-loops 2 --loops 3".split()
    for flags in ((), ("--ood",)):
        status.append(evaluate.main([str(run), *small, *flags, "--out", str(out / "figures")]))
    names.append(sorted(path.name for path in (out / "figures").iterdir()))
    print(json.dumps([status, names]))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Exit statuses and file names of a run that is trained, resumed and evaluated; its folder."""
    out = tmp_path_factory.mktemp("windows")
    return *run_as_on_windows(TRAINED, out), out


@on_linux
def test_a_run_is_trained_saved_resumed_and_evaluated(trained):
    statuses, (first, resumed, checkpoints, figures), _ = trained
    assert statuses == [0, 0, 0, 0]
    written = ["checkpoints", "config.yaml", "metrics.jsonl", "report.png", "results.json"]
    assert first == resumed == [*written, "tensorboard"]  # and no run.lock
    assert checkpoints == ["step-00000015"]
    assert {"evaluation.json", "positions.csv", "loops.pdf", "ood.png"} <= {*figures}


@on_linux
def test_its_files_are_utf_8_with_the_lines_of_the_log_as_bytes(trained):
    run, out = trained[2] / "λr", trained[2] / "figures"
    assert "λr,0," in (out / "positions.csv").read_bytes().decode("utf-8")
    log = (run / "metrics.jsonl").read_bytes()
    assert b"\r" not in log
    assert [json.loads(line)["step"] for line in log.splitlines()] == [5, 5, 10, 10, 15, 15]


WRITERS = """
    import json, sys
    from pathlib import Path
    from looped_fast.ops import cache
    from looped_fast.paper import openml, results_page, state_probes, sweep
    from looped_fast.pretrained import __main__ as release, path
    from looped_fast.kernels import candidates
    out = Path(sys.argv[1])
    curve = {"mean": [1.0, 0.5], "low": [1.0, 0.5], "high": [1.0, 0.5]}
    swept = {"λ = 1": {"n_loops": 1, "by_position": curve, "by_loops": [1.0, 0.5]}}
    sweep.write({"name": "λ", "scale": "lr"}, swept, out)
    row = {predictor: (0.5, 0.1) for predictor in openml.PREDICTORS}
    openml.write(openml.Command(), {"λ": row}, out)
    results_page.write_page(out)
    (out / "README.md").write_text(release.card(path("lr-small")), encoding="utf-8")
    assert cache.update(out / "times.json", {"λ": 1}) is None
    assert cache.load(out / "times.json") == {"λ": 1}
    names = sorted(path.name for path in out.iterdir())
    print(json.dumps([names, len(candidates._all_candidates())]))
"""


@on_linux
def test_every_writer_of_text_names_its_encoding(tmp_path):
    names, n_kernels = run_as_on_windows(WRITERS, tmp_path)
    csvs, images = ["openml.csv", "sweep.csv"], ["openml.png", "sweep.png"]
    pages = ["README.md", "openml.json", "results.md", "sweep.json", "times.json"]
    assert names == sorted([*csvs, *images, *pages])
    assert n_kernels > 0
    assert "λ = 1" in (tmp_path / "sweep.csv").read_text(encoding="utf-8")
    assert "λ" in (tmp_path / "openml.csv").read_text(encoding="utf-8")


LOCKED = """
    import json, sys, threading
    from pathlib import Path
    from looped_fast.training.lock import InUseError, hold
    run, said = Path(sys.argv[1]), []

    def other():
        try:
            with hold(run):
                said.append("held")
        except InUseError as error:
            said.append(str(error))

    for _ in range(2):
        with hold(run):
            with hold(run):
                assert (run / "run.lock").exists()
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        said.append(sorted(path.name for path in run.iterdir()))
    other()
    print(json.dumps(said))
"""


@on_linux
def test_the_lock_keeps_others_out_and_its_file_goes_with_it(tmp_path):
    refused, empty, again, also_empty, held = run_as_on_windows(LOCKED, tmp_path)
    assert refused == again
    assert "is in use: process " in refused
    assert (empty, also_empty, held) == ([], [], "held")


EXPORTED = """
    import json, sys, threading, time
    from pathlib import Path
    from looped_fast import LoopedTransformer, ModelConfig
    from looped_fast.compat import export_official_checkpoint, load_official_checkpoint
    config = ModelConfig(n_dims=2, n_positions=4, n_embd=8, n_head=1)
    weights = LoopedTransformer(config).state_dict()
    path = Path(sys.argv[1], "model_3.pt")
    export_official_checkpoint(path, weights)
    reader = open(path, "rb")
    threading.Timer(0.3, reader.close).start()
    export_official_checkpoint(path, weights)  # waits for the reader
    print(json.dumps([reader.closed, load_official_checkpoint(path).train_step]))
"""


@on_linux
def test_an_official_checkpoint_replaces_one_that_is_being_read(tmp_path):
    assert run_as_on_windows(EXPORTED, tmp_path) == [True, 3]


LOGGED = """
    import json, sys, threading
    from pathlib import Path
    from looped_fast.training.log import METRICS_FILE, MetricsLog, read_metrics
    run = Path(sys.argv[1])
    for step in (1, 2):
        log = MetricsLog(run, step)
        log.write(step, {"loss": 1.0})
        log.close()
        reader = open(run / METRICS_FILE, "rb")
        threading.Timer(0.3, reader.close).start()
    print(json.dumps([line["step"] for line in read_metrics(run / METRICS_FILE)]))
"""


@on_linux
def test_a_log_is_taken_up_while_it_is_read(tmp_path):
    assert run_as_on_windows(LOGGED, tmp_path) == [1, 2]


SAVED = """
    import json, sys, threading
    from pathlib import Path
    import torch
    from looped_fast.training import checkpoint
    run, model = Path(sys.argv[1]), torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    names = []
    for step in (1, 1, 2, 3):
        for old in checkpoint.checkpoints(run):
            reader = open(old / checkpoint.MODEL, "rb")
            threading.Timer(0.3, reader.close).start()
        checkpoint.save(run, step, model, optimizer, config={}, keep=2)
        names.append(sorted(path.name for path in (run / "checkpoints").iterdir()))
    print(json.dumps(names))
"""


@on_linux
def test_checkpoints_are_replaced_and_pruned_while_they_are_read(tmp_path):
    first, second, third = (f"step-0000000{step}" for step in (1, 2, 3))
    assert run_as_on_windows(SAVED, tmp_path) == [
        [first],
        [first],
        [first, second],
        [second, third],
    ]


@pytest.fixture
def windows(monkeypatch):
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setattr(durable, "_PATIENCE", 0.05)


class InUse:
    """A change that is refused ``times`` times."""

    def __init__(self, times):
        self.left, self.calls = times, 0

    def __call__(self, *paths):
        self.calls += 1
        self.left -= 1
        if self.left >= 0:
            raise PermissionError(13, "The process cannot access the file", str(paths[0]))


@pytest.mark.usefixtures("windows")
def test_a_file_in_use_is_waited_for_and_then_named(tmp_path):
    change = InUse(2)
    when_free(change, tmp_path)
    assert change.calls == 3
    with pytest.raises(PermissionError, match=tmp_path.name):
        when_free(InUse(10**9), tmp_path)


def test_other_systems_do_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    change = InUse(1)
    with pytest.raises(PermissionError):
        when_free(change, tmp_path)
    assert change.calls == 1


@pytest.mark.usefixtures("windows")
def test_no_folder_is_opened(tmp_path, monkeypatch):
    monkeypatch.setattr("os.open", InUse(10**9))
    sync_names(tmp_path)


@pytest.mark.parametrize(
    ("platform", "compiler"), [("win32", "cl"), ("darwin", r"clang\+\+"), ("linux", r"g\+\+")]
)
def test_the_compiled_backend_looks_for_the_compiler_of_the_platform(
    monkeypatch, platform, compiler
):
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    missing = compiled_backend._missing_compiler.__wrapped__("cpu")
    assert missing.endswith(f"there is no {compiler.replace(chr(92), '')}; install it or set CXX")


def test_the_command_that_makes_a_model_has_no_backslashes():
    command = reproduce.Command(preset="paper", work=PureWindowsPath(r"C:\work"))
    with pytest.raises(reproduce.Missing, match=r"--out C:/work/runs/lr-looped-paper$"):
        reproduce.find_model(command, "lr", "looped")


# ---- the source tree


def files_in_git() -> dict[str, str]:
    """Path -> mode of every file of the repository."""
    command = ["git", "ls-files", "-s", "-z"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git repository")
    entries = [entry.split("\t") for entry in done.stdout.decode().split("\0") if entry]
    if not entries:
        pytest.skip("this is a copy within another git repository")
    return {path: facts.split()[0] for facts, path in entries}


def test_the_repository_holds_no_symbolic_link():
    modes = files_in_git()
    assert len(modes) > 200
    assert [path for path, mode in modes.items() if mode not in ("100644", "100755")] == []


def test_every_name_in_the_repository_can_be_one_on_windows():
    paths = [*files_in_git()]
    assert [path for path in paths if forbidden(path)] == []
    folders = {str(parent) for path in paths for parent in Path(path).parents}
    counts = Counter(path.lower() for path in (*paths, *folders))
    assert [path for path, count in counts.items() if count > 1] == []
    assert max(map(len, paths)) < 120  # of 260 in all


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("runs/lr:small.json", "lr:small.json"),
        ("a/aux/b", "aux"),
        ("nul.txt", "nul.txt"),
        ("a/b./c", "b."),
        ("a/what?", "what?"),
        ("runs/.tmp-step-00000001/model.safetensors", None),
        ("console/auxiliary.py", None),
    ],
)
def test_forbidden_names(path, part):
    assert forbidden(path) == part


OPENERS = {"open": "r", "fdopen": "r", "NamedTemporaryFile": "w+b", "TemporaryFile": "w+b"}
NO_TEXT = ("os.open", "Image.open", "tarfile.open")


def is_without_encoding(call: ast.Call) -> bool:
    """True for a call that opens or pipes text in the platform's encoding."""
    called, given = (
        ast.unparse(call.func),
        {keyword.arg: keyword.value for keyword in call.keywords},
    )
    name = called.rpartition(".")[2]
    if "encoding" in given or called in NO_TEXT:
        return False
    if name in OPENERS:
        texts = [given["mode"]] if "mode" in given else call.args[:2]
        modes = [t.value for t in texts if isinstance(t, ast.Constant)]
        return "b" not in (modes[-1] if modes else OPENERS[name])
    return name in ("read_text", "write_text") or "text" in given


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("open(path)", True),
        ("path.open()", True),
        ("path.open('w', newline='')", True),
        ("open(path, mode='a')", True),
        ("path.read_text()", True),
        ("subprocess.run(command, text=True)", True),
        ("TemporaryFile('w+')", True),
        ("open(path, 'rb')", False),
        ("path.open('ab', buffering=0)", False),
        ("path.write_text(text, encoding='utf-8')", False),
        ("TemporaryFile()", False),
        ("os.open(path, os.O_RDONLY)", False),
    ],
)
def test_calls_without_an_encoding_are_found(call, expected):
    assert is_without_encoding(ast.parse(call, mode="eval").body) is expected


@pytest.mark.parametrize("folder", ["looped_fast", "kernels", "benchmarks"])
def test_text_files_name_their_encoding(folder):
    """As ruff's PLW1514, which knows the type of few paths."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Call) and is_without_encoding(node)
    ]
    assert found == []
