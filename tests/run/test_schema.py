"""The configuration's JSON schema takes what the configuration takes, and names what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from pydantic import ValidationError

from cit_fast.cli import app
from cit_fast.errors import ConfigError
from cit_fast.methods.config import presets
from cit_fast.methods.registry import build_parts
from cit_fast.run.config import RunConfig
from cit_fast.run.schema import config_schema
from cit_fast.run.yaml_file import read_yaml

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(
    path for place in ("examples", "examples/papers", "bench/configs") for path in (ROOT / place).glob("*.yaml")
)


@pytest.fixture(scope="module")
def validator():
    schema = config_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configurations_fit(validator, path):
    validator.validate(read_yaml(path))


FITTING = [
    {},
    {"methods": list(presets())},
    {"methods": [{"preset": "cit-fast", "replay": {"fraction": 0.2}, "name": "mine"}]},
    {"methods": [{"name": "mine", "router": "switch-tokens", "update": {"name": "merge", "coefficient": "auto"}}]},
    {"methods": [{"name": "mine", "replay": {"name": "my.module.Policy", "anything": [1]}}]},
    {"adapter": None, "data": {"tasks": ["units", {"path": "a folder", "metric": "accuracy"}, "my/tasks/one"]}},
    {"training": {"learning_rate": 1e-3, "report_to": ["tensorboard"]}, "adapter": {"r": 8, "use_rslora": True}},
    {"stages": [{"from": 3, "preset": "cit-fast", "training": {"max_steps": 3}}], "memory": {"per_task": 20}},
    {"memory": "none"},
    {"evaluation": {"tasks": {"sample": 3}, "general": {"lm_eval": ["ifeval"]}}, "gate": {"forgetting": 5}},
]


@pytest.mark.parametrize("config", FITTING)
def test_what_the_configuration_takes_fits(validator, config):
    RunConfig.model_validate(config)
    validator.validate(config)


@pytest.mark.parametrize(
    "config",
    [
        {"metods": ["lcia"]},
        {"methods": ["lciaa"]},
        {"methods": [{"preset": "cit-fast", "replay": {"fracton": 0.2}}]},
        {"methods": [{"name": "mine", "router": "swich"}]},
        {"methods": [{"name": "mine", "replay": {"name": "random", "frac": 0.2}}]},
        {"data": {"train": 0}},
        {"data": {"tasks": [{"pat": "a folder"}]}},
        {"training": {"learning_rat": 1e-3}},
        {"training": {"output_dir": "elsewhere"}},
        {"stages": [{"preset": "cit-fast"}]},
        {"evaluation": {"tasks": "some"}},
        {"version": "one"},
    ],
    ids=str,
)
def test_what_the_configuration_refuses_does_not_fit(validator, config):
    with pytest.raises((ValidationError, ConfigError)):
        [build_parts(method, {}) for method in RunConfig.model_validate(config).methods]
    assert not validator.is_valid(config)


def test_an_editor_can_show_what_things_are(validator):
    schema = validator.schema
    lcia = next(each for each in schema["$defs"]["MethodConfig"]["anyOf"][0]["oneOf"] if each["const"] == "lcia")
    assert "adapter for every group of tasks" in lcia["description"]
    assert "learning rate" in schema["properties"]["training"]["properties"]["learning_rate"]["description"]
    random = next(
        each
        for each in schema["$defs"]["replay"]["anyOf"]
        if each.get("properties", {}).get("name", {}).get("const") == "random"
    )
    assert "number" in json.dumps(random["properties"]["fraction"])


def test_the_command_prints_it(capsys):
    app(["schema"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["title"] == "cit-fast"
