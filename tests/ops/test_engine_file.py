"""The engine's file: found for this PyTorch alone, compiled once, and missed aloud."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from looped_fast.csrc import build
from test_cpu_engine_robustness import run_python

from looped_fast import build as command
from looped_fast.ops import cpu_engine, engine_file

pytestmark = pytest.mark.skipif(
    engine_file.unsupported() is not None, reason=f"no engine: {engine_file.unsupported()}"
)
EXPLAIN = """
    from looped_fast import LoopedTransformer, ModelConfig, explain_backend
    model = LoopedTransformer(ModelConfig(n_dims=3, n_positions=4, n_embd=32, n_head=2))
    print(explain_backend(model, 2, 4))
"""
# A compiler that copies the engine that this machine has, and counts how often it links.
FAKE_COMPILER = """\
#!/bin/sh
if [ "$1" = --version ]; then echo "fake 1.0"; exit; fi
if [ "$1" != -shared ]; then exit; fi
echo linked >> {folder}/links
cp {engine} "$3"
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An empty cache folder and package, a compiler, and nothing loaded yet."""
    engine = cpu_engine.file()
    compiler = tmp_path / "cxx"
    compiler.write_text(FAKE_COMPILER.format(folder=tmp_path, engine=engine))
    compiler.chmod(0o755)
    (tmp_path / "package").mkdir()
    monkeypatch.setattr(engine_file, "PACKAGED", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("LOOPED_FAST_NO_ENGINE", raising=False)
    monkeypatch.setattr(torch.ops, "load_library", load_nothing)
    monkeypatch.setattr(cpu_engine, "_register", lambda: None)
    monkeypatch.setattr(cpu_engine, "_load", cpu_engine._load.__wrapped__)
    return tmp_path


def load_nothing(path):
    """As ``torch.ops.load_library``, of an engine that this process has loaded already."""
    if b"looped_fast" not in Path(path).read_bytes():
        raise OSError(f"{path}: invalid ELF header")


def compiler_that_fails(folder, version="1.0"):
    """Make the compiler fail as g++ does."""
    (folder / "cxx").write_text(
        f"#!/bin/sh\nif [ $1 = --version ]; then echo 'bad {version}'; exit; fi\n"
        f"echo failed >> {folder}/failures\necho 'x.h:3:1: error: no such thing' >&2\nexit 1\n"
    )


def n_links(folder):
    return len((folder / "links").read_text().split())


def test_this_machine_has_its_engine():
    """All that needs the engine is skipped without it; here that is a failure."""
    if not any(map(shutil.which, build.COMPILERS)):
        pytest.skip("no C++ compiler")
    assert cpu_engine.load_error() is None
    assert torch.ops.looped_fast.cpu_torch() == torch.__version__


def test_it_is_compiled_once_and_says_so(machine, capsys):
    file = engine_file.load()
    assert file == machine / "cache" / "looped_fast" / "engines" / build.file_name()
    said = capsys.readouterr().err
    assert f"compiling the CPU engine for PyTorch {torch.__version__}, once" in said
    assert str(file) in said
    assert engine_file.load() == file
    assert capsys.readouterr().err == ""
    assert n_links(machine) == 1


def test_an_installed_engine_is_taken_first(machine):
    installed = machine / "package" / build.file_name()
    shutil.copy(engine_file.load(), installed)
    assert engine_file.load() == installed


def test_an_engine_for_another_torch_is_the_stated_reason(machine, capsys, monkeypatch):
    (machine / "package" / "engine-torch2.11-0123456789ab.so").write_bytes(b"looped_fast")
    assert engine_file.load().parent == engine_file.folder()
    reason = f"the installed engine is for PyTorch 2.11, not {torch.__version__}"
    assert reason in capsys.readouterr().err
    engine_file.load().unlink()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=re.escape(reason)):
        engine_file.load()


@pytest.mark.parametrize(
    ("version", "tag"),
    [
        ("2.13.0+cpu", "torch2.13"),
        ("2.13.1+cu130", "torch2.13"),
        ("2.13.0+rocm7.0", "torch2.13"),
        ("2.8.0", "torch2.8"),
        ("2.14.0.dev20261101+cpu", "torch2.14.0.dev20261101+cpu"),
        ("2.13.0a0+git1a2b3c4", "torch2.13.0a0+git1a2b3c4"),
        ("2.9.0a0+145a3a7bda.nv25.10", "torch2.9.0a0+145a3a7bda.nv25.10"),
    ],
)
def test_releases_of_a_minor_version_share_an_engine(monkeypatch, version, tag):
    monkeypatch.setattr(torch, "__version__", version)
    assert build.torch_tag() == tag


def test_a_changed_source_is_another_engine(machine, monkeypatch):
    shutil.copytree(build.FOLDER, machine / "csrc")
    monkeypatch.setattr(build, "FOLDER", machine / "csrc")
    before = build.file_name()
    (machine / "csrc" / "gelu.h").write_text("// changed")
    assert build.file_name() != before


@pytest.mark.parametrize("where", ["package", "cache"])
def test_an_engine_that_does_not_load_is_compiled_here(machine, where, capsys):
    good = engine_file.load()
    bad = good if where == "cache" else machine / "package" / good.name
    bad.write_bytes(b"made for a later C library")
    if where == "package":
        good.unlink()
    assert engine_file.load() == good
    assert n_links(machine) == 2
    assert ("invalid ELF header" in capsys.readouterr().err) == (where == "package")


def test_processes_that_start_together_compile_once(machine):
    """Each process of a parallel training run asks for the engine."""
    code = textwrap.dedent("""
        import torch
        from looped_fast.ops import engine_file
        torch.ops.load_library = lambda path: None
        engine_file.load()
    """)
    slow = (machine / "cxx").read_text().replace("cp ", "sleep 1; cp ")
    (machine / "cxx").write_text(slow)
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, said
    assert n_links(machine) == 1
    assert sum("compiling the CPU engine" in text for text in said) == 1


def test_without_a_compiler_the_reference_runs_after_one_warning(machine):
    code = f"{EXPLAIN}\n    print(explain_backend(model, 3, 4))\n"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "CXX": "no-such-one"},
        capture_output=True, text=True, cwd=build.FOLDER.parent, check=True,
    )  # fmt: skip
    assert done.stdout.count("backend: reference") == 2
    assert done.stdout.count("not cpu: CXX names no-such-one, which is not on the PATH") == 2
    assert done.stderr.count("the CPU engine is missing") == 1
    assert "apt-get install g++" in done.stderr
    assert "LOOPED_FAST_NO_ENGINE=1 silences this" in done.stderr


@pytest.mark.parametrize("value", ["1", "yes"])
def test_no_engine_is_loaded_compiled_or_missed_where_none_is_wanted(machine, monkeypatch, value):
    monkeypatch.setenv("LOOPED_FAST_NO_ENGINE", value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu_engine.load_error() == "LOOPED_FAST_NO_ENGINE is set"
    assert not engine_file.folder().exists()


@pytest.mark.parametrize("value", ["", "0"])
def test_no_engine_switched_off_changes_nothing(machine, monkeypatch, value):
    monkeypatch.setenv("LOOPED_FAST_NO_ENGINE", value)
    assert cpu_engine.load_error() is None


def test_a_machine_that_has_no_engine_is_not_warned(machine, monkeypatch):
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu_engine.load_error() == "it has no kernels for Linux on riscv64"


def test_a_failure_is_told_and_remembered(machine):
    """Each start of each process would take half a minute to fail again."""
    compiler_that_fails(machine)
    with pytest.warns(UserWarning, match="the CPU engine is missing") as caught:
        assert "error: no such thing" in cpu_engine.load_error()
    message = str(caught[0].message)
    assert "python -m looped_fast.build tries again" in message
    log = Path(message.split("all of it: ")[1].split(")")[0])
    assert "-std=c++20" in log.read_text(encoding="utf-8")  # the whole command
    n_failures = len((machine / "failures").read_text().split())
    with pytest.raises(build.BuildError, match="no such thing"):
        engine_file.load()
    assert len((machine / "failures").read_text().split()) == n_failures
    with pytest.raises(build.BuildError, match="no such thing"):
        engine_file.load(retry=True)
    assert len((machine / "failures").read_text().split()) > n_failures


def test_another_compiler_tries_again(machine):
    working = (machine / "cxx").read_text()
    compiler_that_fails(machine)
    with pytest.raises(build.BuildError):
        engine_file.load()
    (machine / "cxx").write_text(working)
    assert engine_file.load().exists()


@pytest.mark.parametrize("obstacle", ["a file", "no home"])
def test_a_cache_folder_that_cannot_be_written_is_told(machine, monkeypatch, obstacle):
    if obstacle == "a file":
        (machine / "cache").write_text("")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(UserWarning, match="set XDG_CACHE_HOME to a folder that can hold it"):
        assert "the engine can't be written" in cpu_engine.load_error()


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_compiler_that_can_not_be_run_is_told(machine):
    (machine / "cxx").write_bytes(b"\x7fELF of another machine")
    with pytest.raises(build.BuildError, match=r"cxx can't be run: .*Exec format error"):
        engine_file.load()


def test_a_full_disk_leaves_no_half_engine(machine):
    (machine / "cxx").write_text(
        "#!/bin/sh\nif [ $1 = -shared ]; then echo half > $3; "
        "echo 'ld: final link failed: error: No space left on device' >&2; exit 1; fi\n"
    )
    with pytest.raises(build.BuildError, match="No space left on device"):
        engine_file.load()
    assert not list(engine_file.folder().glob("*.so*"))


def test_a_forced_reference_compiles_nothing(machine):
    code = EXPLAIN.replace("n_head=2)", 'n_head=2), backend="reference"')
    assert "not cpu: reference was asked for" in run_python(code)
    assert not engine_file.folder().exists()


def test_the_command_compiles_ahead(machine, capsys):
    assert command.main([]) == 0
    assert capsys.readouterr().out.strip() == str(engine_file.folder() / build.file_name())
    assert command.main([]) == 0
    assert n_links(machine) == 1


def test_the_command_says_why_there_is_no_engine(machine, capsys, monkeypatch):
    compiler_that_fails(machine)
    assert command.main([]) == 1
    assert "error: no such thing" in capsys.readouterr().err
    monkeypatch.setattr(build.platform, "machine", lambda: "riscv64")
    assert command.main([]) == 1
    assert "no kernels for Linux on riscv64" in capsys.readouterr().err
