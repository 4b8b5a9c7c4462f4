"""The documentation site: `make docs` builds it into build/docs, strictly and without the network."""

from __future__ import annotations

import importlib
import itertools
import logging
import re
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter
from docutils import nodes
from pydantic import BaseModel
from sphinx.ext.napoleon import Config, GoogleDocstring
from sphinx.util.nodes import make_refnode

sys.path.insert(0, str(Path(__file__).parent))
# On some processors it logs at import that a kernel of the hub is not there, which is no fault of a page.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import generated  # noqa: E402

import cit_fast  # noqa: E402

project = "cit-fast"
author = "the authors of cit-fast"
release = version = cit_fast.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinxcontrib.mermaid"]

html_theme = "furo"
html_title = f"cit-fast {version}"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathml"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
myst_dmath_double_inline = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True

nitpick_ignore_regex = [
    # Types of other packages and of Python, which the site does not link: it is built without the network.
    ("py:.*", r"(torch|transformers|peft|numpy|pydantic|pydantic_core|annotated_types|rich|sklearn|openai)(\..*)?"),
    ("py:.*", r"(abc|collections|concurrent|contextlib|datetime|enum|pathlib|random|types|typing)(\..*)?"),
    ("py:.*", r"Tensor|Path|nn\.Module|PositiveInt|Image|OnBad"),
    ("py:.*", r"cit_fast\.ops\.(backends\.Implementation|balance_ema\.reference\.Word)"),  # type variables
    # What is private has no page.
    ("py:.*", r"cit_fast\.(\w+\.)*_\w+(\.\w+)*"),
]


def mathml(writer: Any, node: nodes.Element) -> None:
    """Equations as MathML, which browsers show by themselves: no script, nothing to fetch."""
    block = isinstance(node, nodes.math_block)
    found = latex2mathml.converter.convert(node.astext(), display="block" if block else "inline")
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    writer.body.append(f'<div class="math">{number}{found}</div>' if block else found)
    raise nodes.SkipNode


DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGE_OF = {"bench/RESULTS.md": "results.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files outside docs/ that are pages of the site, too."""


def site_links(text: str, folder: Path) -> str:
    """Links that work where the text lies, as links of the site: to a page, else to the file; of a folder, its name."""

    def link(found: re.Match[str]) -> str:
        before, words, target, anchor = found.groups()
        path = (folder / target).resolve()
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        if not name or not path.exists():
            return found[0]  # which Sphinx then complains of
        if path.is_dir():
            return f"{words} (`{name}`)" if words.strip("`") != name else f"`{name}`"
        page = PAGE_OF.get(name)
        if page is None and path.is_relative_to(DOCS):
            page = path.relative_to(DOCS).as_posix()
        place = f"/{page}" if page else f"/../{name}"
        return f"{before}[{words}]({place}{anchor})"

    return re.sub(r"(!?)\[([^\]\[]*)\]\(((?![\w+]+:)[^)#\s]+)((?:#[\w.-]+)?)\)", link, text)


def read_page(app: Any, docname: str, source: list[str]) -> None:
    """Put what the package itself knows in the place of ``<!-- generated: NAME -->``."""
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".md":
        filled = re.sub(r"<!-- generated: (\w+) -->", lambda found: getattr(generated, found[1])(), source[0])
        source[0] = site_links(filled, path.parent)


def with_generated(app: Any, env: Any, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """Pages that are made from the package, which may have changed where their own file has not."""
    return [
        name for name in env.found_docs if "<!-- generated: " in Path(env.doc2path(name)).read_text(encoding="utf-8")
    ]


def read_included(app: Any, path: Path, parent: str, content: list[str]) -> None:
    """Make the links of an included file those of the site."""
    content[0] = site_links(content[0], (DOCS / path).resolve().parent)


GOOGLE = Config(napoleon_use_rtype=False)


def read_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Google's sections as reST. An attribute's is only text: napoleon takes what is before a colon for a type."""
    kind = "function" if what in ("attribute", "data", "property") else what
    lines[:] = GoogleDocstring(lines, GOOGLE, app, kind, name, obj, options).lines()


def read_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Defaults that are no expression as an ellipsis; none of a configuration's section, whose keys have a page."""
    if what == "class" and isinstance(obj, type) and issubclass(obj, BaseModel):
        return "", None
    return None if signature is None else (re.sub(r"<[^<>]*>", "...", signature), returns)


def find_object(app: Any, env: Any, node: Any, shown: Any) -> Any:
    """What a docstring calls by the name that it has where it is defined, at the name under which it is public."""
    if node.get("refdomain") != "py":
        return None
    target, here = node["reftarget"], node.get("py:module") or ""
    known = env.get_domain("py").objects
    last = target.rpartition(".")[2]
    asked = target if target.startswith("cit_fast.") else f"{here}.{target}"
    found = [name for name in known if name.rpartition(".")[2] == last and not known[name].aliased]
    if "." in target and not target.startswith("cit_fast."):
        found = [name for name in found if name.endswith(f".{target}")]
    if not found:
        return None
    name = max(found, key=lambda each: (_shared(each, asked), -len(each)))
    if target.startswith("cit_fast.") and imported(name) is not imported(target):
        return None
    return make_refnode(app.builder, node["refdoc"], known[name].docname, known[name].node_id, shown, name)


def _shared(one: str, other: str) -> int:
    """Parts that two dotted names begin with alike."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))


def imported(dotted: str) -> Any:
    """The object of that name; itself, where there is none."""
    for end in range(dotted.count("."), 0, -1):
        module, names = dotted.split(".")[:end], dotted.split(".")[end:]
        try:
            found = importlib.import_module(".".join(module))
            for each in names:
                found = getattr(found, each)
        except (ImportError, AttributeError):
            continue
        return found
    return dotted


def setup(app: Any) -> None:
    """What the site adds to Sphinx."""
    app.connect("autodoc-process-docstring", read_docstring)
    app.connect("autodoc-process-signature", read_signature)
    app.connect("missing-reference", find_object)
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("env-get-outdated", with_generated)
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
