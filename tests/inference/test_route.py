"""A router as one file, which numpy alone routes with as the run does."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from toy_runs import make_task
from typer.testing import CliRunner

from cit_fast import ContinualModel, ContinualTrainer
from cit_fast.cli import app
from cit_fast.data import TaskStream
from cit_fast.errors import RunError
from cit_fast.inference.export import export_adapters
from cit_fast.models.adapter_bank import BASE

# In a process of its own that can import nothing else.
ROUTE = """
import json, sys
allowed = {"numpy", "json", "route"}
class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "safetensors", "transformers", "cit_fast", "scipy"}:
            raise ImportError(name)
sys.meta_path.insert(0, Only())
sys.path.insert(0, sys.argv[1])
from route import Router
router = Router(sys.argv[1] + "/router.safetensors")
print(json.dumps({"reads": router.reads, "names": [router(ids) for ids in json.load(sys.stdin)]}))
"""


def run(settings, stream, router):
    own = {**settings, "methods": [{"preset": "switch-tokens", "router": router}]}
    own["evaluation"] = {**settings["evaluation"], "untrained": False, "tasks": {"sample": 0}}
    return ContinualTrainer(own, stream=stream, console=Console(quiet=True)).run()[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("reject", [0.0, 0.2])
def test_numpy_routes_as_the_run_does(settings, tmp_path, dtype, reject):
    settings["model"]["dtype"] = dtype
    asked = {"alpha": "Say alpha and then the number", "beta": "Convert the sentiment", "gamma": "Extract the e-mail"}
    tasks = [make_task(name) for name in asked]
    tasks = [
        replace(task, train=tuple(replace(one, instruction=asked[task.name]) for one in task.train)) for task in tasks
    ]
    folder = run(settings, TaskStream(tuple(tasks)), {"reject": reject, "reject_reworded": reject})
    done = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "out"), "--router"])
    assert done.exit_code == 0, done.output
    model = ContinualModel.from_run(folder)
    draw = random.Random(0)
    words = " ".join(asked.values()).split()
    texts = [f"{text}\n\n{k}" for text in asked.values() for k in range(10)]
    texts += [" ".join(draw.choices([*words, "fox", "jumps", "ten", "7"], k=draw.randint(1, 12))) for _ in range(170)]
    expected = model.route(texts)
    tokens = model.encoder.tokenizer(texts, add_special_tokens=False)["input_ids"]
    routed = subprocess.run(
        [sys.executable, "-c", ROUTE, str(tmp_path / "out")],
        input=json.dumps(tokens),
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(routed.stdout)
    assert found == {"reads": "prompt", "names": expected}
    assert len(set(expected) - {BASE}) == 3
    assert (BASE in expected) == bool(reject)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("sequential", "its router is shared; switch-tokens alone can be exported"),
        ("grouping-ema", "its router is grouping"),
        ("switchcit", "reads 'base' of a prompt, which takes a model"),
    ],
)
def test_what_takes_more_than_numpy_is_refused(settings, stream, tmp_path, method, said):
    settings["evaluation"] |= {"untrained": False, "tasks": {"sample": 0}}
    own = {**settings, "methods": [method]}
    (folder,) = ContinualTrainer(own, stream=TaskStream(stream.tasks[:1]), console=Console(quiet=True)).run()
    with pytest.raises(RunError, match=said):
        export_adapters(folder, tmp_path / "out", router=True)
    assert not (tmp_path / "out").exists()
