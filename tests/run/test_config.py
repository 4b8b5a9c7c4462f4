from __future__ import annotations

from pathlib import Path

import pytest
from ablations import ABLATIONS

from cit_fast.errors import ConfigError
from cit_fast.methods.config import Part, presets
from cit_fast.methods.registry import PARTS, build_part
from cit_fast.run.config import RunConfig, load_config

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.yaml"


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 2", "version: configuration version 2; this cit-fast reads version 1"),
        ("sed: 1", "sed: unknown key; did you mean 'seed'?"),
        ("seed: abc", "seed: input should be a valid integer"),
        ("model: {nam: x}", "model.nam: unknown key; did you mean 'name'?"),
        ("methods: [sequentil]", "methods.0: unknown preset 'sequentil'; did you mean 'sequential'?"),
        ("methods: [{preset: sequential, replai: none}]", "methods.0.replai: unknown key; did you mean 'replay'?"),
        ("methods: [sequential, sequential]", "methods: two methods are named 'sequential'"),
        ("methods: [{name: x, replay: {fraction: 0.1}}]", "methods.0.replay: give the part's name"),
        ("methods: []", "methods: tuple should have at least 1 item"),
        ("training: {learning_ratee: 1}", "training.learning_ratee: unknown key; did you mean 'learning_rate'?"),
        ("training: {learning_rate: fast}", "training.learning_rate: Input should be a valid number"),
        ("training: {output_dir: x}", "training.output_dir: set by cit-fast; use output instead"),
        ("training: {bf16: maybe}", "training.bf16: Input should be a valid boolean"),
        ("adapter: {rr: 1}", "adapter.rr: unknown key"),
        ("adapter: {peft_type: LORRA}", "adapter.peft_type: unknown adapter 'LORRA'; did you mean 'LORA'?"),
        ("data: {tasks: [{path: a, fromat: b}]}", "data.tasks.0.fromat: unknown key; did you mean 'format'?"),
        ("data: {tasks: [{name: x}]}", "data.tasks.0: a task source needs exactly one of"),
        ("data: {tasks: []}", "data.tasks: the list is empty"),
        ("data: {train: 0}", "data.train: input should be greater than 0"),
        ("data: 3", "data: input should be a valid dictionary"),
        ("evaluation: {split: tset}", "evaluation.split: input should be 'test' or 'dev'"),
        (
            "methods: [{name: random-replay}]",
            "methods.0.name: 'random-replay' is a preset; write preset: random-replay",
        ),
        ("methods: [{preset: joint, replay: random}]", "methods.0.replay: a joint run trains all tasks at once"),
        ("training: {save_total_limit: 1}", "training.save_total_limit: keep 2 or more"),
        ("training: {save_only_model: true}", "training.save_only_model: set by cit-fast"),
        ("adapter: {peft_type: PROMPT_TUNING}", "adapter.peft_type: PROMPT_TUNING adds tokens to every prompt"),
        ("- 1", "a mapping of keys was expected, not list"),
        ("data: &a {tasks: *a}", "data.tasks.tasks.tasks.tasks.tasks: nested too deep"),
        ("data: " + "[" * 5000, "not valid YAML: nested too deep"),
        ("seed: " + "9" * 5000, "not valid YAML: Exceeds the limit"),
        ("seed: 4294967296", "seed: input should be less than 2147483648"),
        ("seed: 1" + "0" * 30, "seed: a number of 100 bits; 63 are the most"),
        ("seed: 1\nseed: 2", ":1: not valid YAML: key 'seed' is given twice"),
        ("seed: .inf", "seed: inf is no finite number"),
        ("data: {on: 2}", "data.on: unknown key"),
        ("data: {1: 2}", "data.1: a key must be a text, not int"),
        ("data: {null: 2}", "data.None: a key must be a text, not NoneType"),
        ("data: !!set {a}", "data: a set is no value of a configuration"),
        ("data: 2026-11-28 10:00:00", "data: a datetime is no value of a configuration"),
        ("name: !!binary aGk=", "name: a bytes is no value of a configuration"),
        ('output: "a\\0b"', "output: a null character"),
        ('output: "a\\ud83d"', "output: invalid Unicode: a lone surrogate"),
        (f"output: {'x' * 300}", "output: the name 'xxxxxxxxxxxxxxxxxxxx'... is longer than a file's name can be"),
        ("methods: [[sequential]]", "methods.0: "),
        ("methods: [{preset: [a]}]", "methods.0: unknown preset ['a']"),
        ("methods: [{preset: {a: b}}]", "methods.0: unknown preset {'a': 'b'}"),
        ("methods: [{name: {a: b}}]", "methods.0.name: "),
        ("training: {learning_rate: null}", "training.learning_rate: Input should be a valid number"),
        ("data: {template_options: {messages: x}}", "data.template_options.messages: set by cit-fast"),
        ("data: {date: tomorrow}", "data.date: "),
    ],
)
def test_a_wrong_key_is_one_line_with_its_path(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith((f"{path}: {message}", f"{path}{message}"))
    assert "\n" not in str(caught.value)


def test_broken_yaml_names_the_line(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.yaml:2: not valid YAML"):
        load_config(write(tmp_path, "seed: 1\nname: x: y\n"))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="a folder; give the YAML file"):
        load_config(tmp_path)


def test_several_errors_are_counted(tmp_path):
    with pytest.raises(ConfigError, match=r"\(and 1 more\)$"):
        load_config(write(tmp_path, "sed: 1\nmodell: 2"))


def test_quickstart_loads_and_overrides_apply():
    config = load_config(
        QUICKSTART,
        ["seed=7", "methods.1.replay.fraction=0.25", "training.learning_rate=2e-4", "data.tasks=null", "output=x/y"],
    )
    assert config.seed == 7
    assert config.methods[1].replay == Part(name="random", options={"fraction": 0.25})
    assert config.training["learning_rate"] == pytest.approx(2e-4)
    assert config.folder == Path("x/y")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data", "write it as key.path=value"),
        ("=3", "write it as key.path=value"),
        ("methods.9.replay=none", "there is no methods.9"),
        ("seed.x.y=1", "there is no seed"),
        ("methods.9=joint", "there is no such place"),
        ("seed=[1", "--set seed=[1:1: not valid YAML: expected"),
        ("seed=.nan", "--set seed: configuration: nan is no finite number"),
        ("adapter.r=1", "adapter is null"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "seed: 1\nmethods: [sequential]\nadapter: null"), [override])
    assert message in str(caught.value)


def test_null_is_validated_like_any_value(tmp_path):
    text = "training: {save_total_limit: null}\nadapter: {target_modules: null, layers_to_transform: null}"
    config = load_config(write(tmp_path, text))
    assert config.training == {"save_total_limit": None}
    assert config.adapter == {"target_modules": None, "layers_to_transform": None, "peft_type": "LORA"}


def test_anchors_that_multiply_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    with pytest.raises(ConfigError, match="more values than a configuration can have"):
        load_config(write(tmp_path, "\n".join(lines)))


def test_files_that_are_no_text(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="no regular file; give the YAML file"):
        load_config(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / ("x" * 300))
    (tmp_path / "run.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "run.yaml")


def test_a_number_written_as_text_by_yaml_is_a_number(tmp_path):
    config = load_config(write(tmp_path, "training: {learning_rate: 1e-3, weight_decay: 1e-2}"))
    assert config.training == {"learning_rate": 1e-3, "weight_decay": 1e-2}


def test_values_become_what_the_field_wants(tmp_path):
    text = 'training: {gradient_checkpointing: n, bf16: "false", max_steps: 1e1}\nadapter: {r: "4"}'
    config = load_config(write(tmp_path, text))
    assert config.training == {"gradient_checkpointing": False, "bf16": False, "max_steps": 10}
    assert config.training["bf16"] is False
    assert isinstance(config.training["max_steps"], int)
    assert config.adapter["r"] == 4


def test_overriding_one_key_of_a_task_given_by_name_or_path(tmp_path):
    path = write(tmp_path, "data: {tasks: [units, some/folder]}")
    config = load_config(path, ["data.tasks.0.metric=rouge_l", "data.tasks.1.metric=bleu"])
    assert [(task.builtin, task.path, task.metric) for task in config.data.tasks] == [
        ("units", None, "rouge_l"),
        (None, "some/folder", "bleu"),
    ]


def test_every_preset_and_every_ablation_builds_its_parts():
    config = RunConfig.model_validate({"methods": [*presets(), *ABLATIONS.values()]})
    for method in config.methods:
        for kind in PARTS:
            assert build_part(kind, getattr(method, kind), method.name) is not None


def test_options_without_a_name_refine_the_presets_part():
    config = RunConfig.model_validate(
        {"methods": [{"preset": "random-replay", "name": "r", "replay": {"per_task": 3}}]}
    )
    assert config.methods[0].replay == Part(name="random", options={"fraction": 0.1, "per_task": 3})


@pytest.mark.parametrize(
    ("kind", "part", "message"),
    [
        ("replay", "rondom", "replay: unknown name 'rondom'; did you mean 'random'?"),
        ("replay", "no.such.module.Policy", "'no.such.module.Policy' cannot be imported"),
        ("replay", "cit_fast.methods.replay.Missing", "cannot be imported"),
        ("replay", ".relative.Policy", "'.relative.Policy' is no dotted path"),
        ("replay", "cit_fast.methods.replay.", "is no dotted path"),
        ("replay", "os.path", "'os.path' is a module, not a class"),
        ("replay", "sys.maxsize", "'sys.maxsize' is a int, not a class"),
        ("replay", "os.getcwd", "makes a str, which is no replay: it has no select()"),
        ("replay", "builtins.int", "makes a int, which is no replay"),
        ("router", "cit_fast.methods.replay.NoReplay", "makes a NoReplay, which is no router: it has no assign()"),
        ("replay", {"name": "random", "ratio": 1}, "replay.ratio: unknown key"),
        ("replay", {"name": "random", "fraction": 2}, "replay.fraction: 2"),
        ("replay", {"name": "random", "per_task": 0}, "replay.per_task: 0"),
        ("replay", {"name": "random", "per_task": "few"}, "replay.per_task: Input should be"),
        ("update", {"name": "balance-ema", "rule": "best"}, "update.rule: Input should be"),
        ("update", {"name": "balance-ema", "decay": 1.5}, "update.balance-ema: decay=1.5 must be in [0, 1)"),
        ("update", {"name": "balance-ema", "fallback": -1}, "update.balance-ema: fallback=-1"),
    ],
)
def test_a_wrong_part_names_method_and_part(kind, part, message):
    with pytest.raises(ConfigError) as caught:
        build_part(kind, Part.model_validate(part), "mine")
    assert str(caught.value).startswith("method 'mine': ")
    assert message in str(caught.value)


class OwnReplay:
    def __init__(self, share: float = 0.5) -> None:
        self.share = share

    def select(self, context):
        return []


def test_resolved_configuration_is_json_and_ignores_the_output_folder(tmp_path):
    first = RunConfig.model_validate({"output": "a", "methods": ["sequential", "joint"]})
    second = RunConfig.model_validate({"output": "b", "name": "other", "methods": ["sequential"]})
    assert first.resolved(first.methods[0]) == second.resolved(second.methods[0])
    assert first.resolved(first.methods[0]) != first.resolved(first.methods[1])
