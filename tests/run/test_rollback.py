"""An earlier stage becomes the current one, learning goes on from it, and what was taken back can be had again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from growth import run, same, weights
from killed import at_call, killed

from cit_fast.data import TaskStream
from cit_fast.errors import RunError
from cit_fast.evaluation import read_run, read_stages
from cit_fast.files import write_file, write_json
from cit_fast.report.status import status
from cit_fast.run import run_folder as run_folders
from cit_fast.run.rollback import prune, rollback, undo_rollback
from cit_fast.run.run_folder import RunFolder

METHODS = ["switch-tokens", "ewc", {"preset": "random-replay", "replay": {"fraction": 0.2}}]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m if isinstance(m, str) else m["preset"])
def test_learning_goes_on_from_an_earlier_stage(settings, stream, tmp_path, method):
    """What is learned after a rollback is what was learned before it: the same tasks give the same bits."""
    settings["training"] |= {"max_steps": 2}
    alpha, beta, gamma = stream
    (folder,) = run(settings, stream, tmp_path / "mine", method).values()
    before = weights(folder)
    assert rollback(folder, 1) == ["beta", "gamma"]
    assert (read_run(folder).tasks, read_run(folder).status) == (["alpha"], "finished")
    assert len(read_stages(folder)) == 2
    run(settings, stream, tmp_path / "mine", method)
    again = weights(folder)
    assert before.keys() == again.keys()
    assert all(torch.equal(before[name], again[name]) for name in before)

    assert rollback(folder, 1) == ["beta", "gamma"]
    (other,) = run(settings, TaskStream((alpha, gamma)), tmp_path / "other", method).values()
    run(settings, TaskStream((alpha, gamma)), tmp_path / "mine", method)
    same(folder, other, ["beta"])
    assert status(folder)["retired"] == 4
    freed = prune(folder)
    assert freed > 0
    assert status(folder)["retired"] == prune(folder) == 0
    run(settings, TaskStream((alpha, gamma, beta)), tmp_path / "mine", method)  # and it goes on
    assert read_run(folder).tasks == ["alpha", "gamma", "beta"]


def test_a_rollback_is_taken_back_whole(settings, stream, tmp_path):
    settings["training"] |= {"max_steps": 1, "report_to": "none"}
    (folder,) = run(settings, stream, tmp_path, "switch-tokens").values()
    before, record = names(folder), read_run(folder)
    rollback(folder, 2)
    rollback(folder, 1)
    assert undo_rollback(folder) == ["beta"]
    assert undo_rollback(folder) == ["gamma"]
    assert (names(folder), read_run(folder)) == (before, record)
    with pytest.raises(RunError, match="no rollback to take back"):
        undo_rollback(folder)


def test_one_write_decides_and_whoever_comes_next_makes_the_renames(settings, stream, tmp_path):
    """Killed before that write the run is as it was; after it, wherever, its earlier stage is the current one."""
    settings["training"] |= {"max_steps": 1}
    (folder,) = run(settings, stream, tmp_path, "switch-tokens").values()
    before, record = names(folder), read_run(folder)

    def whole() -> bool:
        return (names(folder), read_run(folder), len(read_stages(folder))) == (before, record, 4)

    assert killed(lambda: rollback(folder, 1), at_call(1, run_folders, "write_checked_json"))
    assert whole()
    moves = 0
    while killed(lambda: rollback(folder, 1), at_call(moves + 1, run_folders, "rename")):
        moves += 1
        assert [stage.index for stage in read_stages(folder)] == [0, 1]
        assert (status(folder)["stages"], read_run(folder).tasks) == (1, ["alpha"])
        if moves % 2:  # the same call finishes it, and finds nothing left to take back
            with pytest.raises(RunError, match="has 1 trained stage"):
                rollback(folder, 1)
        assert undo_rollback(folder) == ["beta", "gamma"]
        assert whole()
    assert moves > 3
    undo_rollback(folder)
    for count in range(1, moves):
        rollback(folder, 1)
        assert killed(lambda: undo_rollback(folder), at_call(count, run_folders, "rename"))
        assert [stage.index for stage in read_stages(folder)] == [0, 1]
        run(settings, stream, tmp_path, "switch-tokens")  # has nothing to train, and ends what was begun
        assert whole()


def test_what_has_begun_since_a_rollback_keeps_it_from_being_taken_back(settings, stream, tmp_path):
    """A stage that was begun under the number of one that was taken back, whatever there is of it."""
    settings["training"] |= {"max_steps": 1}
    (folder,) = run(settings, stream, tmp_path, "switch-tokens").values()
    (folder / "candidates/04").mkdir(parents=True)
    write_file(folder / "candidates/04/stage.json", "{}")
    rollback(folder, 2)
    (folder / "candidates/03").mkdir(parents=True)
    write_file(folder / "candidates/03/stage.json", "{}")
    before = names(folder)
    for _ in range(2):
        with pytest.raises(RunError, match="candidates is there again, of a stage that was begun since the rollback"):
            undo_rollback(folder)
    assert (names(folder), read_run(folder).tasks) == (before, ["alpha", "beta"])
    assert rollback(folder, 1) == ["beta"]


@pytest.mark.parametrize("place", ["../elsewhere", "/elsewhere", ".", "stages/../.."])
@pytest.mark.parametrize("part", ["moves", "records", "remove"])
def test_nothing_outside_the_folder_is_moved_written_or_deleted(tmp_path, place, part):
    """A run folder may come from somebody else."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    todo = {"moves": {place: "a"}, "records": {place: {}}, "remove": place}
    todo = {"stage": 1, "moves": {}, "records": {}, "remove": None, part: todo[part]}
    write_json(tmp_path / "run/moving.json", todo)
    with pytest.raises(RunError, match=r"moving.json: damaged \(.* is not below the run's folder\)"):  # noqa: SIM117
        with RunFolder(tmp_path / "run").locked():
            raise AssertionError("nobody may work there")
    assert (tmp_path / "elsewhere").is_dir()
    assert (tmp_path / "run/moving.json").is_file()


def test_what_cannot_be_rolled_back_is_named(settings, stream, tmp_path):
    settings["training"] |= {"max_steps": 1}
    folders = run(settings, stream, tmp_path, "sequential", "joint")
    folder = folders["sequential"]
    for to in (0, 3, 4):
        with pytest.raises(RunError, match="its stages are 1 to 3"):
            rollback(folder, to)
    with pytest.raises(RunError, match="there is none to roll back to"):
        rollback(folders["joint"], 1)
    with pytest.raises(RunError, match=r"is .*nowhere the folder of a cit-fast run"):
        rollback(tmp_path / "nowhere", 1)
    assert not (tmp_path / "nowhere").exists()
    rollback(folder, 2)
    run(settings, stream, tmp_path, "sequential")
    with pytest.raises(RunError, match="has trained stage 3 since the rollback"):
        undo_rollback(folder)
    write_file(folder / "stages" / "02" / "stage.json", "{")
    with pytest.raises(RunError, match="damaged"):
        rollback(folder, 1)
    assert (folder / "stages" / "03" / "stage.json").exists()
