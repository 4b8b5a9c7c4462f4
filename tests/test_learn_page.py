"""The guide's page about a model that goes on learning, line by line, on a tiny model and tiny tasks."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest
from toy_folders import bpe_tokenizer, llama_folder

from cit_fast import cli

PAGE = (Path(__file__).parents[1] / "docs" / "guide" / "learn.md").read_text(encoding="utf-8")
ANSWERS = {
    "returns": "Send it back",
    "orders": "Look it up",
    "shipping": "Track it",
    "refunds": "Pay it out",
    "complaints": "Say sorry",
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with the page's tasks, its YAML and its prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CIT_FAST_CACHE", str(tmp_path / "cache"))
    texts = []
    for name, answer in ANSWERS.items():
        folder = tmp_path / "tasks" / name
        folder.mkdir(parents=True)
        asked = f"A question about {name}: what do we do?"
        for split, start, count in (("train", 0, 480), ("dev", 1000, 8), ("test", 2000, 8)):
            records = [
                {"instruction": asked, "input": f"Case {k}.", "output": answer} for k in range(start, start + count)
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        texts += [f"{asked} Case {k}. {answer}" for k in range(0, 300, 7)]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "initializer_range": 0.08}
    llama_folder(tmp_path / "model", bpe_tokenizer([*texts, "user system assistant"], 500), 0, **sizes)
    (page,) = re.findall(r"```yaml\n(# support.yaml.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "support.yaml").write_text(f"{page}model: {{name: {tmp_path / 'model'}}}\n")
    (tmp_path / "prompts.txt").write_text("A question about orders: what do we do?\n")
    return tmp_path


def said_by(line: str, monkeypatch, capsys) -> tuple[int, str]:
    """Exit code and output of a line of the page."""
    words = line.split()
    if words[0] == "rm":
        for name in words[2:]:
            shutil.rmtree(name)
        return 0, ""
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out + captured.err


@pytest.mark.slow
def test_the_page_line_by_line(place, monkeypatch, capsys):
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    said = {}
    *lines, last = block.splitlines()
    for line in lines:
        command, _, remark = line.partition("#")
        code, text = said_by(command, monkeypatch, capsys)
        assert code == (3 if "exit code 3" in remark else 0), f"{line}\n{text}"
        said[command] = text
    refused = next(text for line, text in said.items() if "learning_rate=0.1" in line)
    assert "task_fall 10" in refused
    assert "is kept as a candidate" in refused
    status = next(text for line, text in said.items() if "status" in line)
    assert "finished, 4 of 4 stages" in " ".join(status.split())
    assert "taken back: complaints" in next(text for line, text in said.items() if "rollback" in line)
    assert "dropped" in next(text for line, text in said.items() if "--drop" in line)
    assert next(text for line, text in said.items() if "generate" in line).splitlines()[0] == "Look it up"
    assert (place / "adapters" / "shared" / "adapter_model.safetensors").is_file()
    assert served(last.replace("8000", "0")) == said[next(line for line in said if "generate" in line)].splitlines()[0]


def served(command: str) -> str:
    """What a client is told by the process that a command starts."""
    started = [sys.executable, "-m", "cit_fast.cli", *shlex.split(command)[1:]]
    process = subprocess.Popen(started, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split(" at ")[1].strip()
        with openai.OpenAI(base_url=url, api_key="any", max_retries=0) as client:
            said = [{"role": "user", "content": Path("prompts.txt").read_text().splitlines()[0]}]
            reply = client.chat.completions.create(model="auto", messages=said, max_tokens=64)
    finally:
        process.terminate()
        assert process.wait(60) == 0
        process.stdout.close()
    return reply.choices[0].message.content
