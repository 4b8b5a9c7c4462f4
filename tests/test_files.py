from __future__ import annotations

import os

import pytest

from cit_fast.errors import RunError
from cit_fast.files import commit_folder, is_disk_full, write_file, write_json


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_whole_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    write_file(path, "one\ud800")
    assert path.read_bytes() == b"one\\ud800"
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert names(path.parent) == ["file.txt"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_file(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"file\.txt: cannot be written \(No space left on device\)") as caught:
        write_file(path, "new")
    assert is_disk_full(caught.value)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"score": float("nan")})


def test_commit_replaces_a_folder(tmp_path):
    for text in ("one", "two"):
        temporary = tmp_path / "t"
        temporary.mkdir()
        (temporary / "f").write_text(text)
        commit_folder(temporary, tmp_path / "sub" / "final")
    assert (tmp_path / "sub" / "final" / "f").read_text() == "two"
    assert names(tmp_path / "sub") == ["final"]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/3"), True),
        (OSError(13, "Permission denied"), False),
        (ValueError("x"), False),
    ],
)
def test_recognising_a_full_disk(error, full):
    assert is_disk_full(error) is full
    outer = RuntimeError("outer")
    outer.__cause__ = error
    assert is_disk_full(outer) is full
