"""The order of the floors: a module imports only from its own floor and those below, and imports make no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"errors"},
    {"text", "values", "files", "processes"},
    {"cache"},
    {"ops", "kernels"},
    {"optim"},
    {"data"},
    {"evaluation"},
    {"models"},
    {"embeddings"},
    {"key_parts"},
    {"methods"},
    {"run"},
    {"inference"},
    {"analysis"},
    {"report"},
    {"cli"},
)
FLOOR_OF = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
NATIVE = {"_native", "_native_cuda"}  # compiled, with nothing above them


def _files() -> dict[str, Path]:
    files = {f"cit_fast.kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}
    for path in (ROOT / "cit_fast").rglob("*.py"):
        files[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return files


FILES = _files()


def _imports(module: str) -> Iterator[str]:
    """Modules of the package that ``module`` imports, at its head or in a function; not those for types alone."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    for guard in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if isinstance(guard.test, ast.Name) and guard.test.id == "TYPE_CHECKING":
            guard.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            found = next((known for n in range(len(parts), 0, -1) if (known := ".".join(parts[:n])) in FILES), None)
            if found not in (None, module):
                yield found


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", sorted(set(FILES) - {"cit_fast"}))
def test_imports_point_down(module):
    room = _room(module)
    for imported in _imports(module):
        if imported == "cit_fast":  # the package itself: its version and the compiled modules
            continue
        assert FLOOR_OF[_room(imported)] <= FLOOR_OF[room], f"{module} imports {imported}, which is on a floor above"
        if FLOOR_OF[_room(imported)] == FLOOR_OF[room] and {room, _room(imported)} != {"ops", "kernels"}:
            assert _room(imported) == room, f"{module} imports {imported}, a neighbour on the same floor"


def test_no_circles():
    graph = {module: set(_imports(module)) - {"cit_fast"} for module in FILES if module != "cit_fast"}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a circle: {' -> '.join([*above[above.index(module) :], module])}"
        if module in done:
            return
        for imported in sorted(graph[module]):
            visit(imported, (*above, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_every_room_has_a_floor():
    rooms = {_room(module) for module in FILES if module != "cit_fast"}
    assert rooms == set(FLOOR_OF)
