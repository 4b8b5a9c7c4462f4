from __future__ import annotations

import datetime
import hashlib
import json
import re
from decimal import Decimal

import pytest

from cit_fast.data.builtin import builtin_stream, builtin_task, builtin_task_names, stream
from cit_fast.data.builtin.kinds import Draw, Kind, parse_wording, split_of
from cit_fast.data.builtin.messages import REQUESTS, URGENCY
from cit_fast.data.builtin.words import GOODS, NOUNS
from cit_fast.data.example import Example, Task
from cit_fast.errors import DataError
from cit_fast.evaluation.metrics import score

NAMES = builtin_task_names()
SIZES = {"train": 400, "dev": 40, "test": 120}


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: builtin_task(name, **SIZES) for name in NAMES}


def examples_of(task: Task) -> tuple[Example, ...]:
    return (*task.train, *task.dev, *task.test)


def test_there_are_at_least_eight_tasks_and_the_sizes_are_as_asked(tasks: dict[str, Task]) -> None:
    assert len(NAMES) >= 8
    assert len(set(NAMES)) == len(NAMES)
    for name, task in tasks.items():
        assert task.name == name
        assert {"train": len(task.train), "dev": len(task.dev), "test": len(task.test)} == SIZES
        assert {example.task for example in examples_of(task)} == {name}


def test_every_generator_is_listed_once() -> None:
    made = [kind.name for module in (stream.goods, stream.messages, stream.notes) for kind in module.KINDS]
    assert sorted(made) == sorted(NAMES)


def test_a_seed_gives_the_same_examples_and_another_seed_gives_others() -> None:
    for name in NAMES:
        assert builtin_task(name, train=20) == builtin_task(name, train=20)
        inputs, others = ({e.input for e in builtin_task(name, seed=s, train=20).train} for s in (0, 1))
        assert len(inputs & others) < 10


def test_the_examples_are_the_same_on_every_platform_and_version() -> None:
    digest = hashlib.sha256()
    for task in builtin_stream(train=30, dev=10, test=10):
        for example in examples_of(task):
            digest.update(repr((example.instruction, example.input, example.references, example.key_parts)).encode())
    assert digest.hexdigest()[:16] == "07c5c6a1a49de90e"


def test_a_larger_split_starts_with_the_smaller_one(tasks: dict[str, Task]) -> None:
    for name in NAMES:
        small = builtin_task(name, train=7, dev=3, test=5)
        assert small.train == tasks[name].train[:7]
        assert small.dev == tasks[name].dev[:3]
        assert small.test == tasks[name].test[:5]


def test_no_input_occurs_twice_and_none_in_two_splits(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        inputs = [example.input for example in examples_of(task)]
        assert len(set(inputs)) == len(inputs)


@pytest.mark.parametrize("name", NAMES)
def test_splits_stay_apart_across_seeds(name: str, tasks: dict[str, Task]) -> None:
    train = {example.input for example in builtin_task(name, seed=5, train=1500, dev=0, test=0).train}
    assert train.isdisjoint(example.input for example in (*tasks[name].dev, *tasks[name].test))


def test_each_task_has_ten_wordings_with_key_parts_and_training_sees_them_all(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        assert len(task.instructions) >= 10
        assert len({instruction.lower() for instruction in task.instructions}) == len(task.instructions)
        for example in examples_of(task):
            assert example.key_parts
            assert all(text.strip() == text != "" for text in example.key_part_texts)
            assert "{" not in example.instruction
            assert "}" not in example.instruction
            outside = example.masked_instruction.replace("[MASK]", "").strip(" .,;:?")
            assert len(outside) > 0 or len(example.key_parts) > 1


def test_no_wording_serves_two_tasks(tasks: dict[str, Task]) -> None:
    wordings = [instruction for task in tasks.values() for instruction in task.instructions]
    assert len(set(wordings)) == len(wordings)


def test_references_keep_the_format_rule_and_the_label_set(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        assert task.answer_pattern is not None
        for example in examples_of(task):
            assert len(example.references) == 1
            assert re.fullmatch(task.answer_pattern, example.references[0]), example
            if task.labels:
                assert example.references[0] in task.labels
        if task.labels:
            for split in (task.train, task.dev, task.test):
                assert {example.references[0] for example in split} == set(task.labels)


def test_the_metric_gives_references_full_marks_and_the_input_none(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        references = [example.references for example in task.test]
        assert score(task.metric, [answers[0] for answers in references], references, task.labels).value == 100
        assert score(task.metric, [example.input for example in task.test], references, task.labels).value == 0


def test_inputs_are_short_and_whole(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        for example in examples_of(task):
            assert 5 <= len(example.input) <= 120
            assert example.input == " ".join(example.input.split())
            assert "{" not in example.input


# The answers once more, from the inputs alone.

LONG_MONTHS = [datetime.date(2000, month, 1).strftime("%B") for month in range(1, 13)]
MONTHS = {datetime.date(2000, month, 1).strftime("%b"): month for month in range(1, 13)}


def read_date(text: str) -> str:
    month = re.search(r"\b(" + "|".join([*LONG_MONTHS, *MONTHS]) + r")\b", text)
    year = re.search(r"\b20\d\d\b", text)
    assert month is not None
    assert year is not None
    near = re.search(rf"(\d+)(?:st|nd|rd|th)?(?: of)? {month[0]}|{month[0]} (\d+)", text)
    assert near is not None
    return datetime.date(int(year[0]), MONTHS[month[1][:3]], int(near[1] or near[2])).isoformat()


def read_amount(text: str) -> str:
    sign = {"$": "USD", "€": "EUR", "£": "GBP"}
    name = {"dollars": "USD", "euros": "EUR", "pounds": "GBP"}
    if found := re.search(r"([$€£])(\d+(?:\.\d\d)?)", text):
        return f"{sign[found[1]]} {Decimal(found[2]):.2f}"
    found = re.search(r"([\d.]+) (dollars|euros|pounds)(?: and (\d+) (?:cents|pence))?", text)
    assert found is not None
    return f"{name[found[2]]} {Decimal(found[1]) + Decimal(found[3] or 0) / 100:.2f}"


TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]


def read_time(text: str) -> str:
    if found := re.search(r"(\d+)\.(\d\d) ([ap])m", text):
        return f"{found[1]}:{found[2]} {found[3]}m"
    if found := re.search(r"(\w+) o'clock in the (\w+)", text):
        word, minute = found[1], 0
    else:
        found = re.search(r"(\w+) past (\w+) in the (morning|afternoon|evening)", text)
        assert found is not None
        word, minute = found[2], {"ten": 10, "quarter": 15, "twenty": 20, "half": 30}[found[1]]
    return f"{NUMBERS.index(word) + 1}:{minute:02d} {'am' if 'in the morning' in text else 'pm'}"


def read_name(text: str) -> str:
    places = "Bakery|Books|Cafe|Cinema|Garage|Grocery|Hotel|Pharmacy|Pizza|Tools"
    text = re.sub(rf"\b[A-Z]\w+ (?:{places})\b|\bOn\b|\bMeet\b|\bCall\b", "", text)
    text = re.sub(rf"\b(?:{'|'.join(LONG_MONTHS)})\b", "", text)
    found = re.search(r"\b([A-Z][a-z]+) ([A-Z][a-z]+)\b", text)
    assert found is not None
    return f"{found[2]}, {found[1][0]}."


def read_number(text: str) -> str:
    teens = ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"]
    values = {word: i + 1 for i, word in enumerate(NUMBERS + teens)}
    values |= {word: 10 * i for i, word in enumerate(TENS, 2)}
    words = re.findall(r"[a-z]+", text)
    start = next(i for i, word in enumerate(words) if word in values)
    total = below_thousand = 0
    for end in range(start, len(words)):
        word = words[end]
        if word == "thousand":
            total, below_thousand = below_thousand * 1000, 0
        elif word == "hundred":
            below_thousand *= 100
        elif word in values:
            below_thousand += values[word]
        elif word != "and":
            return f"{word}: {total + below_thousand}"
    raise AssertionError(text)


def read_plurals(text: str) -> str:
    plural = dict(NOUNS)
    pairs = re.findall(r"(\w+) x (\d+)", text)
    return " + ".join(f"{count} {noun if count == '1' else plural[noun]}" for noun, count in pairs)


SMALL = {"km": "m", "kg": "g", "l": "ml"}


def read_units(text: str) -> str:
    found = re.search(r"([\d.]+) (km|kg|l)\b", text)
    assert found is not None
    grams = Decimal(found[1]) * 1000
    assert grams == grams.to_integral_value()
    return f"{grams.to_integral_value():f} {SMALL[found[2]]}"


def read_sorting(text: str) -> str:
    week = [datetime.date(2024, 1, day).strftime("%A") for day in range(1, 8)]
    return " | ".join(sorted(re.split(r", |; | and ", text), key=lambda entry: week.index(entry.split()[0])))


def read_records(text: str) -> str:
    pairs = dict(re.findall(r"(\w+)(?:: | = | is | - )(\w+)", text))
    return json.dumps({key: int(value) if value.isdigit() else value for key, value in sorted(pairs.items())})


def read_emails(text: str) -> str:
    return ", ".join(f"<{address.lower()}>" for address in re.findall(r"[A-Za-z.]+@[a-z]+\.example", text))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("dates", read_date),
        ("amounts", read_amount),
        ("times", read_time),
        ("names", read_name),
        ("numbers", read_number),
        ("plurals", read_plurals),
        ("units", read_units),
        ("sorting", read_sorting),
        ("records", read_records),
        ("emails", read_emails),
    ],
)
def test_answers_are_right(name: str, read, tasks: dict[str, Task]) -> None:
    for example in examples_of(tasks[name]):
        assert read(example.input) == example.references[0], example.input


@pytest.mark.parametrize(("name", "table"), [("intents", REQUESTS), ("priority", URGENCY)])
def test_labels_come_from_the_sentence_that_carries_them_and_test_requests_are_new(
    name: str, table: dict[str, tuple[str, ...]], tasks: dict[str, Task]
) -> None:
    forms = {re.sub(r"\\{\w+\\}", r"\\w+", re.escape(sentence)): label for label in table for sentence in table[label]}
    assert len(forms) == sum(map(len, table.values()))
    used: dict[str, set[str]] = {}
    for split in ("train", "test"):
        for example in getattr(tasks[name], split):
            found = [form for form in forms if re.search(rf"(^|[ ,.]){form}($| )", example.input)]
            assert {forms[form] for form in found} == {example.references[0]}, example.input
            used.setdefault(split, set()).update(found)
    if name == "intents":
        assert used["train"].isdisjoint(used["test"])


def test_word_tables_have_one_plural_per_noun() -> None:
    for table in (GOODS, NOUNS):
        assert len({one for one, _ in table}) == len(table)
        assert all(re.fullmatch("[a-z]+", word) for pair in table for word in pair)
    assert all(one != many for one, many in GOODS)


def test_test_nouns_are_new(tasks: dict[str, Task]) -> None:
    train, test = (
        {noun for e in split for noun in re.findall(r"[a-z]{2,}", e.input)}
        for split in (tasks["plurals"].train, tasks["plurals"].test)
    )
    assert len(test) > 20
    assert train.isdisjoint(test)


def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(DataError, match=r"no built-in task 'date'; did you mean 'dates'"):
        builtin_task("date")
    with pytest.raises(DataError, match=", ".join(sorted(NAMES))):
        builtin_task("zzzzzz")


def test_a_negative_size_and_an_empty_task_are_refused() -> None:
    with pytest.raises(DataError, match="dev=-1"):
        builtin_task("dates", dev=-1)
    with pytest.raises(DataError, match="empty"):
        builtin_task("dates", train=0, test=0)


def test_streams_keep_the_order_and_the_settings() -> None:
    assert builtin_stream(train=2, dev=0, test=1).names == NAMES
    some = builtin_stream(["times", "dates"], seed=3, train=4, dev=1, test=2)
    assert some.names == ("times", "dates")
    assert some[0] == builtin_task("times", seed=3, train=4, dev=1, test=2)
    with pytest.raises(DataError, match="two tasks of one name"):
        builtin_stream(["dates", "dates"], train=1, test=0)
    with pytest.raises(DataError, match="empty"):
        builtin_stream([])


def test_a_finite_generator_repeats_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = Kind(
        "few", "exact_match", r"\d", ("{Copy}.", "Please {copy}."), lambda draw: (f"{draw.between(0, 19)}", "1")
    )
    monkeypatch.setitem(stream._KINDS, "few", kind)
    own = [str(i) for i in range(20) if split_of(str(i)) == "train"]
    train = builtin_task("few", train=3 * len(own), dev=0, test=0).train
    for start in range(0, len(train), len(own)):
        assert sorted(e.input for e in train[start : start + len(own)]) == sorted(own)
    with pytest.raises(DataError, match=r"test=21 asked, about \d+ different inputs exist"):
        builtin_task("few", train=1, dev=0, test=21)


def test_draws_cover_their_range_and_reserved_parts_do_not_meet() -> None:
    draw = Draw("key", "train")
    assert {draw.between(2, 5) for _ in range(200)} == {2, 3, 4, 5}
    assert sorted(draw.distinct("abc", 3)) == ["a", "b", "c"]
    assert 300 < sum(draw.chance(0.4) for _ in range(1000)) < 500
    pool = range(40)
    everything: list[int] = []
    for split in ("train", "dev", "test"):
        one = Draw("key", split)
        everything += {one.pick_reserved(pool) for _ in range(1000)}
    assert sorted(everything) == list(pool)


def test_splits_have_their_shares() -> None:
    counts = dict.fromkeys(("train", "dev", "test"), 0)
    for i in range(4000):
        counts[split_of(f"text {i}")] += 1
    assert abs(counts["train"] / 4000 - 5 / 8) < 0.03
    assert abs(counts["test"] / 4000 - 2 / 8) < 0.03


def test_a_wording_without_marks_has_no_key_part() -> None:
    assert parse_wording("Do it.") == ("Do it.", ())
    assert parse_wording("{How} is {it}") == ("How is it", ((0, 3), (7, 9)))
