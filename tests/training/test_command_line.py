"""A mistyped flag, or value of a choice, gets the nearest valid one, in every command."""

import io
import re
import sys

import pytest

from benchmarks import compare
from looped_fast import evaluate, openml, presets, reproduce, state_probes, sweep, train
from looped_fast.pretrained import __main__ as release
from looped_fast.training.command_line import Parser, check_flags, parse

COMMANDS = {
    "train": train, "evaluate": evaluate, "sweep": sweep, "openml": openml,
    "state_probes": state_probes, "reproduce": reproduce,
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("train", "--learning-rate 0.1", "unknown flag --learning-rate; did you mean --lr?"),
        ("train", "--n-loop 3", "did you mean --n-loops?"),
        ("train", "--n-lops 3", "did you mean --n-loops?"),
        ("train", "--n_lops=3", "unknown flag --n_lops; did you mean --n-loops?"),
        ("train", "--batchsize 3", "did you mean --batch-size?"),
        ("train", "--stepss 3", "did you mean --steps?"),
        ("train", "--train-steps 3", "did you mean --steps?"),
        ("train", "--epochs 3", "did you mean --steps?"),
        ("train", "--precision bf16", "did you mean --amp?"),
        ("train", "--hidden-size 64", "did you mean --n-embd?"),
        ("train", "--curriculum.dims.strat 3", "did you mean --curriculum.dims.start?"),
        ("train", "--no-recomput", "did you mean --no-recompute?"),
        ("train", "--amp bf61", "unknown value of --amp, 'bf61'; did you mean 'bf16'?"),
        ("train", "--amp=fp61", "did you mean 'fp16'?"),
        ("train", "--model standart", "did you mean 'standard'?"),
        ("train", "--attention flash-attn", "did you mean 'flash_attn'?"),
        ("evaluate", "lr-small --prompt 40", "did you mean --prompts?"),
        ("evaluate", "lr-small --baselines figures", "did you mean 'figure'?"),
        ("sweep", "injection --pressets tiny", "did you mean --preset?"),
        ("sweep", "injektion", "unknown sweep 'injektion'; did you mean 'injection'?"),
        ("openml", "--data ofline", "did you mean 'offline'?"),
        ("openml", "--test-seed 3", "did you mean --test-seeds?"),
        ("state_probes", "lr-small --learning-rate 1", "did you mean --lr?"),
        ("reproduce", "--probe-step 3", "did you mean --probe-steps?"),
        ("reproduce", "ablation", "did you mean 'ablations'?"),
    ],
)
def test_what_is_mistyped_gets_the_nearest_and_exit_2(
    tmp_path, monkeypatch, capsys, command, args, message
):
    monkeypatch.chdir(tmp_path)
    assert COMMANDS[command].main(args.split()) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_flag_like_no_other_gets_no_hint():
    with pytest.raises(ValueError, match=re.escape("unknown flag --zzz; --help lists all flags")):
        check_flags(["--zzz"], {"--lr": ()})


def test_valid_flags_values_and_what_is_no_flag_pass():
    valid = {"--lr": (), "--amp": ("off", "bf16"), "--n-loops": ()}
    check_flags(["run", "--lr", "-1e-3", "--n_loops=3", "--amp", "off", "-h", "--help"], valid)
    check_flags([], valid)
    check_flags(["--", "--zzz"], valid)
    check_flags(["--amp"], valid)  # the parser says that a value is missing
    check_flags(["--amp", "--lr", "3"], valid)


def test_an_argparse_command_takes_no_abbreviations(capsys):
    parser = Parser("mine")
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--kind", choices=["a", "b"])
    parser.add_argument("--head_dim", type=int, choices=[32, 64])
    assert parser.parse_args(["--head_dim", "32"]).head_dim == 32
    assert parser.parse_args(["--minutes", "3"]).minutes == 3
    for args, message in (
        (["--minut", "3"], "mine: error: unknown flag --minut; did you mean --minutes?"),
        (["--kind", "c"], "mine: error: unknown value of --kind, 'c'"),
    ):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(args)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "args", "message"),
    [
        (release.main, "run --cpu-minuts 3 --how x", "did you mean --cpu-minutes?"),
        (presets.main, "tinny", "did you mean 'tiny'?"),
        (presets.main, "--prest tiny", "unknown flag --prest"),
        (compare.main, "--repeat 3", "did you mean"),
    ],
)
def test_the_argparse_commands_do_as_the_others(capsys, main, args, message):
    with pytest.raises(SystemExit) as stop:
        main(args.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
@pytest.mark.parametrize("command", ["train", "evaluate", "release"])
def test_a_path_that_cannot_be_printed_is_no_error(monkeypatch, command, encoding):
    """On Windows output that goes to a file is in the code page, and paths hold any character."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    if command == "release":
        Parser("mine").parse_args([])
    else:
        record = COMMANDS[command].Command
        default = {
            "train": lambda: record(presets.preset_config("tiny")),
            "evaluate": lambda: record(()),
        }[command]()
        parse(record, [], command, default)
    print("writing to \u5b66\u4e60", flush=True)
    assert written.getvalue().strip() == rb"writing to \u5b66\u4e60"
