"""The ablations of ``bench/configs/ablations.yaml``, by name."""

from __future__ import annotations

from pathlib import Path

import yaml

from cit_fast.methods.config import presets

_FILE = Path(__file__).parents[2] / "bench" / "configs" / "ablations.yaml"
ABLATIONS = {method["name"]: method for method in yaml.safe_load(_FILE.read_text(encoding="utf-8"))["methods"]}


def spelled(methods, fraction=None):
    """The methods as a configuration takes them, with the name of an ablation spelled out.

    ``fraction``: a budget of replay for presets that have the one of their paper.
    """
    return [_spelled(method, fraction) if isinstance(method, str) else method for method in methods]


def _spelled(name, fraction):
    own = presets().get(name, {}).get("replay", {})
    fixed = {key: None for key in ("per_task", "tasks", "instances") if key in own}
    if fraction is None or not fixed:
        return ABLATIONS.get(name, name)
    return {"preset": name, "replay": {**fixed, "fraction": fraction}}
