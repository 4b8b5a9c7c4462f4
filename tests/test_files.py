from __future__ import annotations

import contextlib
import json
import os

import pytest

from cit_fast.errors import RunError
from cit_fast.files import (
    commit_folder,
    damaged_files,
    is_disk_full,
    new_folder,
    read_checked_json,
    tree_checksums,
    write_checked_json,
    write_file,
    write_json,
)


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


def test_a_checked_record_notices_any_change(tmp_path):
    path = tmp_path / "a.json"
    value = {"a": [1, 2.5, None, "é\u2028"], "b": {"c": [(1, 2)]}}
    write_checked_json(path, value)
    plain = json.loads(json.dumps(value))
    assert read_checked_json(path) == plain
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("2.5", "2.6"), encoding="utf-8")
    with pytest.raises(RunError, match=r"a\.json: damaged \(its checksum is that of another content"):
        read_checked_json(path)
    assert read_checked_json(path, check=False) == {**plain, "a": [1, 2.6, None, "é\u2028"]}
    path.write_text('{"a": 1}')  # without a checksum it is taken as it is
    assert read_checked_json(path) == {"a": 1}
    for broken in ("[1]", "{", "[" * 100_000):
        path.write_text(broken)
        with pytest.raises(RunError, match=r"a\.json: damaged"):
            read_checked_json(path)
    with pytest.raises(FileNotFoundError):
        read_checked_json(tmp_path / "b.json")


def test_checksums_of_a_tree(tmp_path):
    (tmp_path / "one" / "sub").mkdir(parents=True)
    (tmp_path / "one" / "a").write_text("a")
    (tmp_path / "one" / "sub" / "b").write_text("b")
    sums = tree_checksums(tmp_path / "one")
    assert list(sums) == ["a", "sub/b"]
    assert damaged_files(tmp_path / "one", sums) == {}
    (tmp_path / "one" / "a").write_text("c")
    (tmp_path / "one" / "sub" / "b").unlink()
    assert damaged_files(tmp_path / "one", sums) == {"a": "its content has changed", "sub/b": "it is not there"}
    assert damaged_files(tmp_path / "one", sums, below="sub/") == {"sub/b": "it is not there"}


def test_a_new_folder_appears_whole_and_clears_up_after_the_killed(tmp_path):
    (tmp_path / ".out.dead.tmp").mkdir()
    with new_folder(tmp_path / "out") as one:
        (one / "f").write_text("one")
        with new_folder(tmp_path / "out2"), new_folder(tmp_path / "out.3"):
            assert one.exists()
        assert not (tmp_path / "out").exists()
        with contextlib.suppress(RuntimeError), new_folder(tmp_path / "out") as other:  # at the same time
            assert one.exists()
            raise RuntimeError
        assert not other.exists()
    assert names(tmp_path) == ["out", "out.3", "out2"]
    assert (tmp_path / "out" / "f").read_text() == "one"
