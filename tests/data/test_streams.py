"""Streams as files: what they say, what is missing, and that a configuration can name one."""

from __future__ import annotations

import json

import pytest

from cit_fast.data.streams import check_stream, find_stream, missing_parts, stream_files
from cit_fast.errors import ConfigError, DataError
from cit_fast.evaluation.metrics import METRICS
from cit_fast.models.config import DataConfig
from cit_fast.run.config import validated


@pytest.mark.parametrize("name", stream_files())
def test_every_stream_that_ships_is_whole(name, tmp_path):
    stream = stream_files()[name]
    assert stream.says
    assert stream.source
    assert stream.where
    for order, tasks in stream.orders.items():
        assert sorted(tasks) == sorted(stream.tasks), order  # every order has every task once
        sources = stream.sources(order, tmp_path)
        assert [source.name for source in sources] == tasks
        assert {source.metric for source in sources} <= METRICS.keys()
    assert set(stream.digests) <= set(stream.tasks)
    assert len(missing_parts(stream, next(iter(stream.orders)), tmp_path)) == len(stream.tasks)


def test_the_published_orders():
    counts = {name: len(stream.tasks) for name, stream in stream_files().items()}
    assert counts == {
        "coin-8": 8, "inscl-16": 16, "instrdialog-19": 19, "superni-15": 15, "switchcit-5": 5, "trace-8": 8,
    }  # fmt: skip
    superni = stream_files()["superni-15"]
    assert [name.partition("_")[0] for name in superni.orders["order-1"][:3]] == ["task1572", "task363", "task1290"]
    assert [name.partition("_")[0] for name in superni.orders["order-2"][:3]] == ["task748", "task073", "task1590"]
    inscl = stream_files()["inscl-16"]
    assert inscl.orders["reverse"] == inscl.orders["curriculum"][::-1]


def task_file(path, answer):
    path.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev", "test"):
        task = {"Definition": ["Say it."], "Instances": [{"input": f"{k}", "output": [answer]} for k in range(4)]}
        (path / f"{split}.json").write_text(json.dumps(task))


def test_a_part_that_is_missing_or_another_file(tmp_path):
    first = find_stream("superni-15/order-1")[0].orders["order-1"][0]
    with pytest.raises(DataError, match=rf"data\.stream: superni-15: task {first}: .* not there \(and 14 more\); to"):
        check_stream("superni-15", tmp_path)
    for task in stream_files()["superni-15"].tasks:
        task_file(tmp_path / task, "x")
    with pytest.raises(DataError, match=r"\.json is another file than the stream's \(its SHA-256 differs\)"):
        check_stream("superni-15/order-2", tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stream": "superni-51", "root": "x"}, "data.*stream: 'superni-51' is unknown; did you mean .superni-15."),
        ({"stream": "superni-15/order-9", "root": "x"}, "superni-15 has no order 'order-9'"),
        ({"stream": "superni-15"}, "root: name the folder that holds the data of superni-15"),
        ({"root": "x"}, "root: the folder of a stream's data, and no stream is named"),
        ({"stream": "trace-8", "root": "x", "tasks": ["units"]}, "tasks: they are those of the stream"),
    ],
)
def test_what_a_configuration_may_say(data, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validated({"data": data}, "my.yaml")
    assert "\n" not in str(caught.value)


def test_a_stream_becomes_tasks_and_options(tmp_path):
    config = validated({"data": {"stream": "trace-8", "root": str(tmp_path)}}, "my.yaml")
    assert config.data.max_length == 2048  # the stream's
    assert [source.metric for source in config.data.tasks][3] == "edit_similarity"
    own = validated({"data": {"stream": "trace-8", "root": str(tmp_path), "max_length": 100}}, "my.yaml")
    assert own.data.max_length == 100
    assert DataConfig.model_validate(config.data.model_dump(mode="json")) == config.data  # as a run records it
