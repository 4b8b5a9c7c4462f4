"""The ablations of ``bench/configs/ablations.yaml``, by name."""

from __future__ import annotations

from pathlib import Path

import yaml

_FILE = Path(__file__).parents[2] / "bench" / "configs" / "ablations.yaml"
ABLATIONS = {method["name"]: method for method in yaml.safe_load(_FILE.read_text(encoding="utf-8"))["methods"]}


def spelled(methods):
    """The methods as a configuration takes them, with the name of an ablation spelled out."""
    return [ABLATIONS.get(method, method) if isinstance(method, str) else method for method in methods]
