from __future__ import annotations

import json

import pytest


@pytest.fixture
def write(tmp_path):
    def write(name, content, encoding="utf-8"):
        path = tmp_path / name
        if name.endswith(".jsonl") and isinstance(content, list):
            content = "\n".join(json.dumps(record, ensure_ascii=False) for record in content)
        elif not isinstance(content, (str, bytes)):
            content = json.dumps(content, ensure_ascii=False)
        path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
        return path

    return write
