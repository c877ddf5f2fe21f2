"""What keeps the tree easy to read: no circles between modules, few files at each root, no long functions."""

import ast
from pathlib import Path

import grimp
import pytest

from gateway import REPO

SOURCE = REPO / "src" / "selfloop"
MAX_FUNCTION_LINES = 50
MAX_ROOT_FILES = 8
LONG_BY_NATURE = {
    "control/gateway.py": {"__init__"},  # puts everything together, a line each
    "control/resources/new_rows.py": {"new_run"},  # an argument a column
}
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
# A migration is its statements, and is never changed.
MODULES = [path for path in sorted(SOURCE.rglob("*.py")) if "versions" not in path.parts]


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that import one another, directly or not (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in sorted(imports[module]):
            if other not in index:
                visit(other)
            if other in stack:
                lowest[module] = min(lowest[module], lowest[other])
        if lowest[module] == index[module]:
            circle = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for module in sorted(imports):
        if module not in index:
            visit(module)
    return found


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_each_other():
    graph = grimp.build_graph("selfloop", cache_dir=None)
    assert circles({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}) == []


@pytest.mark.parametrize("room", ["control", "server", "worker"])
def test_a_root_has_few_files(room: str):
    assert len(list((SOURCE / room).glob("*.py"))) <= MAX_ROOT_FILES


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_functions_are_short(path: Path):
    known = LONG_BY_NATURE.get(str(path.relative_to(SOURCE)), set())
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, FUNCTION)]
    lines = {node.name: (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {name for name, num in lines.items() if num > MAX_FUNCTION_LINES} <= known
