"""What ``errors`` reads and refuses, in the time of a stat."""

import json
import os
import sys

import pytest

from looped_fast.errors import naming, read_file, read_json


def test_a_regular_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(ValueError, match=r"file has 5 bytes, and at most 4 are read"):
        read_file(path, 4)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX files")
@pytest.mark.parametrize("kind", ["fifo", "zero", "link to zero", "socket", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "file"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, 0o140644)
    elif kind == "zero":
        path = "/dev/zero"
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match="a regular file is needed"):
        read_file(path, 10)


def test_a_huge_sparse_file_is_refused_unread(tmp_path):
    path = tmp_path / "file"
    with path.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ValueError, match=r"file has 1099511627776 bytes, and at most 67108864"):
        read_json(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000, "nested too deep"),
        (b"[1]", "holds a JSON list"),
        (b"null", "holds a JSON NoneType"),
        (b"", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b'{"a": "\xe9"}', "is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, content, message):
    path = tmp_path / "numbers.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"numbers\.json .*{message}|numbers\.json {message}"):
        read_json(path)


def test_a_json_object_is_read(tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps({"ä": [1, None]}), encoding="utf-8")
    assert read_json(path) == {"ä": [1, None]}


def test_an_error_about_content_starts_with_the_file():
    with (
        pytest.raises(ValueError, match=r"^run/a\.yaml: beta2 = 2$"),
        naming("run/a.yaml"),
    ):
        raise ValueError("beta2 = 2")
