"""HTML pages in one file: their templates, and pictures inside them."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from cit_fast.report.collect import number


def template(name: str) -> Template:
    """A template of this package, which escapes what is filled in and knows the filter ``number``."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    return environment.get_template(name)


def data_address(png: bytes) -> str:
    """A picture as an address that holds it, so that a page needs no other file."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
