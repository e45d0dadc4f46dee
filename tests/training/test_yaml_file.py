"""YAML files of settings: damaged and hostile ones are refused by name, in under a second."""

import os
import re
import time

import pytest

from looped_fast.compat.config_files import load_config, load_official_config
from looped_fast.training import yaml_file
from looped_fast.training.yaml_file import read_yaml


def aliases(levels, first, pattern):
    """Each level holds the one before it nine times."""
    lines = [f"a0: &a0 {first}"]
    for i in range(1, levels):
        lines.append(f"a{i}: &a{i} {pattern.format(', '.join([f'*a{i - 1}'] * 9))}")
    return "\n".join(lines)


HOSTILE = {
    "alias bomb": (aliases(9, "[x]", "[{}]"), "at most 5000 values"),
    "merge bomb": (aliases(9, "{x: 1}", "{{<<: [{}]}}"), "at most 5000 values"),
    "long chain of aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000)),
        "at most 20 deep",
    ),
    "value within itself": ("a: &a [*a]", "stands for a value that it is part of"),
    "brackets": ("[" * 20_000, "at most 20 deep"),
    "braces": ("{a: " * 10_000, "at most 20 deep"),
    "dashes": ("- " * 20_000, "at most 20 deep"),
    "question marks": ("? " * 20_000, "at most 20 deep"),
    "many values": (f"a: [{'1,' * 30_000}]", "at most 5000 values"),
    "large file": ("# " + "x" * 70_000, "70002 bytes, and at most 65536"),
    "long number": ("steps: " + "1" * 5000, "a whole number has at most 18 characters"),
    "long hexadecimal": ("steps: 0x" + "f" * 5000, "a whole number has at most 18 characters"),
    "number as name": ("1: 2", "'1' is no name of a setting"),
    "null as name": ("null: 2", "'null' is no name of a setting"),
    "switch as name": ("on: 2", "'on' is no name of a setting"),
    "list as name": ("[a]: 2", "a collection is no name of a setting"),
    "a name twice": ("steps: 1\nsteps: 2", "'steps' is given twice"),
    "impossible date": ("a: 2020-99-99", "month must be in 1..12"),
    "impossible character": ('a: "\\UFFFFFFFF"', "is not YAML"),
    "tag": ("a: !!bool maybe", "the tag tag:yaml.org,2002:bool is not read"),
    "code": ("a: !!python/object/apply:os.getcwd []", "is not read"),
    "control character": ("a: \x07", "is not YAML"),
    "two documents": ("a: 1\n---\nb: 2", "expected a single document"),
    "unknown alias": ("a: *b", "undefined alias 'b'"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("load", [read_yaml, load_config, load_official_config])
def test_a_hostile_file_is_refused_by_name_in_under_a_second(tmp_path, load, case):
    text, message = HOSTILE[case]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    seconds = []
    for _ in range(3):  # other tests run beside this one, and coverage traces it
        started = time.process_time()
        with pytest.raises(ValueError, match=re.escape(message)) as caught:
            load(path)
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
@pytest.mark.parametrize("load", [read_yaml, load_config, load_official_config])
def test_a_file_in_another_encoding_is_named_with_the_byte(tmp_path, load, encoding):
    path = tmp_path / "mine.yaml"
    path.write_bytes("out: läuft".encode(encoding))
    with pytest.raises(ValueError, match=r"mine\.yaml is not UTF-8 text: byte \d is 0x"):
        load(path)


def test_utf_8_is_read_with_and_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "mine.yaml"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text("out: läuft", encoding=encoding)
        assert read_yaml(path) == {"out": "läuft"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX files")
@pytest.mark.parametrize("load", [read_yaml, load_config, load_official_config])
def test_a_fifo_a_device_and_a_folder_are_refused_at_once(tmp_path, load):
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("fifo", "zero", "folder"):
        with pytest.raises(ValueError, match=rf"{name}\.yaml is a .*; a regular file is needed"):
            load(tmp_path / f"{name}.yaml")


def test_aliases_and_merges_within_the_limits_are_read(tmp_path):
    path = tmp_path / "mine.yaml"
    base, more = "base: &base {seed: 1, keep: 2}", "more: &more {<<: *base, keep: 3}"
    path.write_text(f"{base}\n{more}\nlast: {{<<: *more}}\n")
    assert read_yaml(path)["last"] == {"seed": 1, "keep": 3}


def test_the_limits_are_where_they_say(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("[" * yaml_file.DEEPEST + "]" * yaml_file.DEEPEST)
    read_yaml(path)
    path.write_text(f"[{'1,' * (yaml_file.MOST_VALUES - 1)}]")
    assert len(read_yaml(path)) == yaml_file.MOST_VALUES - 1
    path.write_text("1" * yaml_file.LONGEST_NUMBER)
    assert read_yaml(path) < 2**63
    path.write_bytes(b"#" * yaml_file.LARGEST_FILE)
    assert read_yaml(path) is None
