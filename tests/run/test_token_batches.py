"""``training.tokens_per_batch``: batches of so many tokens, the same ones whatever interrupts the training."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from growth import same
from hypothesis import example, given
from hypothesis import strategies as st
from killed import at_call, killed
from rich.console import Console

from cit_fast import ContinualTrainer
from cit_fast.data import Example, TaskStream
from cit_fast.errors import ConfigError
from cit_fast.evaluation import read_stages
from cit_fast.models.collation import padded_length
from cit_fast.run import stage_trainer
from cit_fast.run.config import RunConfig
from cit_fast.run.plan import plan_run
from cit_fast.run.stage_settings import training_at
from cit_fast.run.token_batches import TokenBatches

LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=60)


@example([90] * 3, 90, False, 0, 2)
@example([90] * 3, 90, True, 0, 4)
@given(LENGTHS, st.integers(90, 400), st.booleans(), st.integers(0, 9), st.integers(1, 4))
def test_every_example_is_in_a_batch_and_no_batch_is_too_large(lengths, budget, packed, seed, processes):
    padded = None if packed else padded_length
    of_each = []
    for process in range(processes):
        batches = TokenBatches(lengths, budget, padded=padded, seed=seed, processes=processes, process=process)
        of_each.append(list(batches))
        assert len(of_each[-1]) == len(batches)
    assert len({len(batches) for batches in of_each}) == 1
    dealt = [tuple(batch) for batches in of_each for batch in batches]
    assert all(dealt)
    times = Counter(itertools.chain(*dealt))
    assert set(times) == set(range(len(lengths)))
    if max(times.values()) > 1:  # nothing could be cut in two
        assert all(len(batch) == 1 for batch in dealt)
        assert sum(times.values()) - len(lengths) < processes
    for batch in dealt:
        width = max(lengths[k] for k in batch)
        size = sum(lengths[k] for k in batch) if packed else len(batch) * padded_length(width)
        assert size <= budget or len(batch) == 1


def test_an_example_of_two_rows_counts_as_two():
    """Pairs of 100 tokens twice, and unmasked ones of 200: rows of 112 and of 224."""
    lengths, rows = [100, 200] * 20, [2, 1] * 20
    for batch in TokenBatches(lengths, 900, rows=rows, padded=padded_length).batches:
        assert sum(rows[k] for k in batch) * padded_length(max(lengths[k] for k in batch)) <= 900


def test_epochs_have_the_same_batches_in_another_order():
    batches = TokenBatches(list(range(1, 61)), 100, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        epochs.append(list(batches))
    assert epochs[0] == epochs[2] != epochs[1]
    assert Counter(map(tuple, epochs[0])) == Counter(map(tuple, epochs[1]))
    assert list(TokenBatches(list(range(1, 61)), 100, seed=4)) != epochs[0]


def test_batches_are_filled_and_lengths_kept_together():
    """Half of the room of batches of eight as they come is padding; here, next to nothing is."""
    lengths = [20, 300] * 100
    batches = TokenBatches(lengths, 2048, padded=padded_length).batches
    room = sum(len(batch) * padded_length(max(lengths[k] for k in batch)) for batch in batches)
    assert room < 1.15 * (100 * padded_length(20) + 100 * padded_length(300))
    assert len(batches) <= room / 2048 * 1.35


@pytest.fixture
def uneven(stream):
    """Tasks whose examples are of many lengths."""

    def longer(example: Example, k: int) -> Example:
        return replace(example, input=example.input + " and so on" * (k % 6))

    tasks = [replace(task, train=tuple(longer(one, k) for k, one in enumerate(task.train))) for task in stream]
    return TaskStream(tuple(tasks))


@pytest.fixture
def by_tokens(settings):
    settings["training"] |= {"tokens_per_batch": 192, "num_train_epochs": 2, "save_steps": 2, "logging_steps": 1}
    del settings["training"]["per_device_train_batch_size"]
    return settings


def run(settings, stream):
    return ContinualTrainer(settings, stream=stream, console=Console(quiet=True)).run()


@pytest.mark.parametrize("method", ["random-replay", "kpig"])
def test_killed_in_an_epoch_and_resumed_with_the_same_bits(by_tokens, uneven, tmp_path, method):
    by_tokens["methods"] = [method]
    (whole,) = run(by_tokens | {"output": str(tmp_path / "whole")}, uneven)
    steps = [stage.steps for stage in read_stages(whole)[1:]]
    assert steps[0] % 2 == 0
    assert steps[0] // 2 >= 4
    for calls in (steps[0] // 2 - 1, steps[0] // 2):  # in the first epoch, then, resumed, in the second
        assert killed(lambda: run(by_tokens, uneven), at_call(calls, stage_trainer.StageTrainer, "compute_loss"))
    (resumed,) = run(by_tokens, uneven)
    same(resumed, whole)


def test_every_answer_counts_once_an_epoch(by_tokens, uneven, monkeypatch):
    """The labelled tokens of a run are those of one in batches of examples."""
    seen: list[tuple[int, int, int]] = []
    compute = stage_trainer.StageTrainer.compute_loss

    def counted(self, model, inputs, *args, **kwargs):
        rows, width = inputs["input_ids"].shape
        seen.append((rows, rows * width, int((inputs["labels"] != -100).sum())))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(stage_trainer.StageTrainer, "compute_loss", counted)
    run(by_tokens, TaskStream(uneven.tasks[:1]))
    mine, seen = seen, []
    assert all(size <= 192 or rows == 1 for rows, size, _ in mine)
    del by_tokens["training"]["tokens_per_batch"]
    by_tokens["training"]["per_device_train_batch_size"] = 4
    run(by_tokens | {"output": by_tokens["output"] + "-by-examples"}, TaskStream(uneven.tasks[:1]))
    assert sum(labelled for *_, labelled in mine) == sum(labelled for *_, labelled in seen) > 0


@pytest.mark.parametrize(
    ("training", "said"),
    [
        ({"tokens_per_batch": 64}, "64 tokens do not hold an example of data.max_length"),
        ({"tokens_per_batch": 0}, "tokens_per_batch: Input should be greater than 0"),
        ({"tokens_per_batch": "many"}, "tokens_per_batch: Input should be a valid integer"),
        ({"tokens_per_batch": 512, "per_device_train_batch_size": 4}, "leave out per_device_train_batch_size"),
        ({"tokens_per_batch": 512, "train_sampling_strategy": "group_by_length"}, "leave out train_sampling_strategy"),
    ],
)
def test_what_is_refused_in_one_line(settings, stream, training, said):
    settings["training"] = training
    with pytest.raises(ConfigError, match=said) as error:
        run(settings, stream)
    assert "\n" not in str(error.value)


def test_it_can_be_switched_off(by_tokens):
    by_tokens["stages"] = [{"from": 2, "training": {"tokens_per_batch": None}}]
    config = RunConfig.model_validate(by_tokens)
    assert training_at(config.training, config.stages, 2)["tokens_per_batch"] is None


def test_a_later_setting_holds(by_tokens):
    by_tokens["stages"] = [{"from": 2, "training": {"per_device_train_batch_size": 8}}]
    config = RunConfig.model_validate(by_tokens)
    assert training_at(config.training, config.stages, 1)["tokens_per_batch"] == 192
    second = training_at(config.training, config.stages, 2)
    assert "tokens_per_batch" not in second
    assert second["per_device_train_batch_size"] == 8


def test_a_plan_counts_their_steps(by_tokens, tmp_path):
    by_tokens["data"] |= {"tasks": ["units", "dates"], "train": 40}
    config = RunConfig.model_validate({**by_tokens, "methods": ["sequential"]})
    (planned,) = plan_run(config).stages.values()
    (folder,) = ContinualTrainer(config, console=Console(quiet=True)).run()
    for stage, plan in zip(read_stages(folder)[1:], planned, strict=True):
        assert plan.steps <= stage.steps <= 1.5 * plan.steps + 2
