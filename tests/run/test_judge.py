"""The metric ``judge``: a chat model marks answers, in a run, once for each answer."""

from __future__ import annotations

import dataclasses
import json

import pytest
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.data import Example, TaskStream
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation import read_run, read_stages
from cit_fast.evaluation.predictions import rescore
from cit_fast.run.judge import JudgeConfig, judge_score

EXAMPLES = [Example("Sum up", "a text", ("short",)), Example("Name {answer}", "", ("x",))]


def replies(respond):
    """What the stub server is to do: reply with the text that ``respond(prompt)`` gives."""
    return lambda prompt, attempt: (200, {"choices": [{"message": {"content": respond(prompt)}}]}, {})


def judge(server, **options):
    return JudgeConfig(base_url=server.url, model="marker", **options)


def test_marks_become_points_and_are_asked_once(serve, tmp_path):
    def respond(prompt):
        assert "to 10 (as good" in prompt
        return "7" if "a text" in prompt else " Mark: 10/10 "

    with serve(replies(respond)) as server:
        found = judge_score(judge(server), EXAMPLES, ["answer", "{input}"], tmp_path)
        assert (found.value, found.per_example) == (85.0, [70.0, 100.0])
        assert judge_score(judge(server), EXAMPLES, ["answer", "{input}"], tmp_path) == found
        assert len(server.prompts) == 2
        assert any("Name {answer}" in prompt and "{input}" in prompt for prompt in server.prompts)  # taken as they are


@pytest.mark.parametrize("reply", ["eleven", "11", "", "7 or 8", "The answer names 3 of 4 colours, which is good."])
def test_what_is_no_mark_is_named_and_asked_again(serve, tmp_path, reply):
    said = iter([reply, "5"])
    with serve(replies(lambda prompt: next(said))) as server:
        with pytest.raises(RunError, match=r"evaluation\.judge: marker replied .*not a mark from 0 to 10"):
            judge_score(judge(server), EXAMPLES[:1], ["answer"], tmp_path)
        assert judge_score(judge(server), EXAMPLES[:1], ["answer"], tmp_path).value == 50.0


def test_a_run_with_a_judge(settings, stream, serve):
    judged = dataclasses.replace(stream[0], metric="judge")
    settings["methods"] = ["sequential"]
    with serve(replies(lambda prompt: "4")) as server:
        settings["evaluation"] = {**settings["evaluation"], "judge": judge(server).model_dump()}
        trainer = ContinualTrainer(settings, stream=TaskStream((judged,)), console=Console(quiet=True))
        (folder,) = trainer.run()
    stages, run = read_stages(folder), read_run(folder)
    assert [stage.scores[judged.name] for stage in stages] == [40.0, 40.0]
    recorded = run.config["evaluation"]["judge"]
    assert (recorded["model"], "{answer}" in recorded["prompt"]) == ("marker", True)
    assert "key" not in json.dumps(recorded).replace("key_variable", "")
    assert all(entry.agrees for entry in rescore(folder))  # the marks themselves are kept


def test_a_judge_that_is_not_there(settings, stream):
    judged = dataclasses.replace(stream[0], metric="judge")
    with pytest.raises(ConfigError, match=r"task 'alpha': metric: metric judge asks a chat model.*evaluation\.judge"):
        ContinualTrainer({**settings, "methods": ["sequential"]}, stream=TaskStream((judged,)))
    bad = {**settings["evaluation"], "judge": {"base_url": "http://x", "model": "y", "prompt": "Mark it"}}
    with pytest.raises(ConfigError, match=r"evaluation\.judge\.prompt: it must hold \{answer\}"):
        ContinualTrainer({**settings, "evaluation": bad}, stream=stream)
