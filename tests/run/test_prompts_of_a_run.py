"""What a run asks: one date from its first stage on, template variables of the configuration."""

from __future__ import annotations

import datetime
import shutil

import pytest

from cit_fast import ContinualModel, ContinualTrainer
from cit_fast.evaluation import read_predictions, read_run
from cit_fast.inference.load_any import load_any_model
from cit_fast.run import config as configuration


@pytest.fixture
def dated(settings, tiny_model_folder, tmp_path, tiny_tokenizer):
    """Settings with a model whose chat template writes today's date, and brevity where it is asked for."""
    folder = tmp_path / "dated"
    shutil.copytree(tiny_model_folder, folder)
    form = "{{ strftime_now('%Y-%m-%d') }}{{ ' brief' if brief }}\n"
    (folder / "chat_template.jinja").write_text(form + tiny_tokenizer.chat_template)
    options = {"data": {**settings["data"], "template_options": {"brief": True}}}
    return {**settings, **options, "model": {"name": str(folder)}}


@pytest.fixture
def today(monkeypatch):
    class Clock(datetime.date):
        day = 27

        @classmethod
        def today(cls):
            return datetime.date(2026, 11, cls.day)

    monkeypatch.setattr(configuration.DataConfig.model_fields["date"], "default_factory", Clock.today)
    configuration.DataConfig.model_rebuild(force=True)
    configuration.RunConfig.model_rebuild(force=True)
    yield Clock
    monkeypatch.undo()
    configuration.DataConfig.model_rebuild(force=True)
    configuration.RunConfig.model_rebuild(force=True)


def prompts_of(folder):
    paths = sorted(folder.glob("stages/*/predictions/*.jsonl"))
    return {entry.prompt.partition("\n")[0] for path in paths for entry in read_predictions(path)}


def test_a_run_has_one_date(dated, stream, today, edit_record):
    (folder,) = ContinualTrainer(dated, stream=stream).run()
    assert prompts_of(folder) == {"2026-11-27 brief"}
    shutil.rmtree(folder / "stages" / "03")
    edit_record(folder / "run.json", status="running")
    today.day = 28
    assert configuration.DataConfig().date.day == 28
    ContinualTrainer(dated, stream=stream).run()
    assert prompts_of(folder) == {"2026-11-27 brief"}
    assert read_run(folder).config["data"]["date"] == "2026-11-27"
    for encoder in (ContinualModel.from_run(folder).encoder, load_any_model(str(folder)).encoder):
        asked = encoder.tokenizer.decode(encoder.prompt(stream[0].test[0]))
        assert asked.startswith("2026-11-27 brief\n")
