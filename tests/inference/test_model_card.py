"""Model cards of exports, and their way to the hub, which a stand-in plays."""

from __future__ import annotations

import base64
import json
import re

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from served import served
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from typer.testing import CliRunner

from cit_fast.cli import app
from cit_fast.data.sources import TaskSource
from cit_fast.errors import RunError
from cit_fast.evaluation import read_stages
from cit_fast.inference.continual_model import read_trained
from cit_fast.inference.export import export_adapters, export_merged
from cit_fast.inference.model_card import adapter_card, push


def test_every_set_says_what_it_has_learned(finished, tmp_path):
    names = export_adapters(finished, tmp_path / "out", license_="apache-2.0")
    stages = read_stages(finished)
    for name in names:
        card = ModelCard.load(tmp_path / "out" / name / "README.md")
        assert card.data.license == "apache-2.0"
        assert card.data.library_name == "peft"
        assert card.data.pipeline_tag == "text-generation"
        (stage,) = (each for each in stages if each.adapter == name and each.index)
        (task,) = stage.trained
        then, now = stage.scores[task], stages[-1].scores[task]
        assert f"| {task} | {stage.index} | {then:.1f} | {now:.1f} | token_f1 | given from Python |" in card.text
        assert f'PeftModel.from_pretrained(base, "{name}")' in card.text
    whole = ModelCard.load(tmp_path / "out" / "README.md")
    assert all(f"[`{name}`]({name})" in whole.text for name in names)


def test_a_merged_model_has_one_too(finished, tmp_path):
    name = read_stages(finished)[-1].adapter
    export_merged(finished, tmp_path / "out", name)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.library_name, card.data.license) == ("transformers", "unknown")
    assert f"with the adapter set `{name}` merged" in card.text
    assert len(re.findall(r"^\| (?:dates|mail|mood) \|", card.text, re.MULTILINE)) == 1


def test_where_data_and_base_are_from(finished):
    """By the names that others know them by: no folder of this machine is in a card."""
    record, config, stages = read_trained(finished)
    tasks = ("units", "/home/me/secret/dates", TaskSource(dataset="glue", subset="sst2", revision="abc"))
    config = config.model_copy(update={"data": config.data.model_copy(update={"tasks": tasks})})
    local = adapter_card(record, config, stages, stages[1].adapter, "mit")
    assert "base_model:" not in local  # a folder is none that the hub knows
    cards = [adapter_card(record, config, stages, stage.adapter, "mit") for stage in stages[1:]]
    assert [re.search(r"token_f1 \| (.*) \|", card)[1] for card in cards] == [
        "built-in task units",
        "dates",
        "glue, sst2, revision abc",
    ]
    assert "secret" not in "".join(cards)
    model = config.model.model_copy(update={"name": "some/base", "revision": "v2"})
    card = adapter_card(record, config.model_copy(update={"model": model}), stages, stages[1].adapter, "mit")
    assert ModelCard(card).data.base_model == "some/base"
    assert 'from_pretrained("some/base", revision="v2")' in card


class Hub:
    """The requests by which a folder gets to the hub."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.tokens: set[str | None] = set()
        self.status = 200
        where = "/api/models/{owner}/{name}"
        self.app = Starlette(
            routes=[
                Route("/api/repos/create", self.create, methods=["POST"]),
                Route("/api/validate-yaml", self.validate, methods=["POST"]),
                Route(where + "/preupload/main", self.preupload, methods=["POST"]),
                Route(where + "/commit/main", self.commit, methods=["POST"]),
            ]
        )

    async def create(self, request):
        self.tokens.add(request.headers.get("authorization"))
        if self.status != 200:
            return JSONResponse({"error": "no"}, self.status)
        self.created.append(await request.json())
        return JSONResponse({"url": "https://huggingface.co/me/mine", "name": "me/mine", "id": "1"})

    async def validate(self, request):
        assert ModelCard((await request.json())["content"]).data.license
        return JSONResponse({"errors": [], "warnings": []})

    async def preupload(self, request):
        files = (await request.json())["files"]
        return JSONResponse(
            {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        )

    async def commit(self, request):
        for line in (await request.body()).splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return JSONResponse({"commitUrl": "https://huggingface.co/me/mine/commit/1", "commitOid": "1", "success": True})


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with served(hub.app) as url:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        yield hub


def test_an_export_is_pushed(finished, tmp_path, hub):
    out = tmp_path / "out"
    command = ["export", str(finished), str(out), "--push", "me/mine", "--private", "--license", "mit"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert re.search(r"Pushed: http://127.0.0.1:\d+/me/mine\n", result.output)
    assert hub.files == {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (created,) = hub.created
    assert created.get("visibility") == "private" or created.get("private") is True  # by the version of the client
    assert hub.tokens == {"Bearer hf_secret"}


@pytest.mark.parametrize("status", [401, 403, 500])
def test_a_hub_that_says_no_leaves_the_export(finished, tmp_path, hub, status):
    hub.status = status
    export_adapters(finished, tmp_path / "out")
    with pytest.raises(RunError, match=r"out: written, and not pushed to me/mine: ") as refused:
        push(tmp_path / "out", "me/mine")
    assert "\n" not in str(refused.value)
    assert "hf_secret" not in str(refused.value)
    with pytest.raises(RunError, match=r"not pushed to no name: "):
        push(tmp_path / "out", "no name")
