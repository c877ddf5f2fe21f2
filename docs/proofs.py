"""Which test proves what: read out of the tests, so that the tables of the documentation cannot drift from them.

A function of a test file proves a method when it (or a helper that it calls) uses the method's name, a route when it
spells the route's path, and a command when it spells the command's words.
"""

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
_RUN_HELPERS = {"do", "post", "submit"}  # of the tests' own client of a run: their first argument ends the path


_WITH_SLASHES = {"{model_id}": ".+", "{name}": ".+", "{folder}": ".+", "{file}": ".+", "{path}": ".+"}


@dataclass
class Function:
    """A function of the tests, with all that it names, itself or through what it calls."""

    file: Path
    name: str
    names: set[str] = field(default_factory=set[str])
    texts: set[str] = field(default_factory=set[str])
    calls: set[str] = field(default_factory=set[str])

    @property
    def label(self) -> str:
        return f"{self.file.relative_to(TESTS)}::{self.name}"


def functions(*patterns: str) -> list[Function]:
    """Tests and checks of the files that match, each with what its helpers name."""
    files = sorted({file for pattern in patterns for file in TESTS.glob(pattern)})
    found = [function for file in files for function in _of_file(file)]
    for _ in range(4):  # helpers of helpers of helpers
        by_name: dict[str, list[Function]] = {}
        for function in found:
            by_name.setdefault(function.name, []).append(function)
        for function in found:
            for called in [f for name in sorted(function.calls) for f in by_name.get(name, [])]:
                function.names |= called.names
                function.texts |= called.texts
    return [f for f in found if f.name.startswith(("test_", "check_"))]


def _of_file(file: Path) -> list[Function]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    shared = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    tables = {target.id: node for node in shared for target in _targets(node) if isinstance(target, ast.Name)}
    return [
        _read(file, node, tables) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else [node.target]


def _read(file: Path, function: ast.FunctionDef | ast.AsyncFunctionDef, tables: dict[str, ast.stmt]) -> Function:
    made = Function(file, function.name)
    todo: list[ast.AST] = [function]
    seen: set[str] = set()
    while todo:
        for node in ast.walk(todo.pop()):
            match node:
                case ast.Attribute(attr=attr):
                    made.names.add(attr)
                case ast.Name(id=name) if name in tables and name not in seen:
                    # A table of cases beside the tests belongs to the tests that use it.
                    seen.add(name)
                    todo.append(tables[name])
                case ast.Name(id=name) | ast.arg(arg=name):
                    made.calls.add(name)
                case ast.JoinedStr():
                    made.texts.add(_flat(node))
                case ast.Constant(value=str(text)):
                    made.texts.add(text)
                case ast.Call(func=ast.Attribute(attr=attr), args=[ast.Constant(value=str(text)), *_]) if (
                    attr in _RUN_HELPERS
                ):
                    made.texts.add(f"/loops/runs/{{}}/{text}")
                case _:
                    pass
            if isinstance(node, ast.List | ast.Tuple):
                made.texts.add(
                    " ".join(e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, str))
                )
            if isinstance(node, ast.Call):
                made.texts.add(
                    " ".join(a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
                )
    return made


def _words(nodes: list[ast.expr]) -> str:
    return " ".join(n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))


def _flat(node: ast.JoinedStr) -> str:
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)


def of_methods(methods: Iterable[str], *patterns: str) -> dict[str, list[str]]:
    """Tests of each ``Class.method`` or ``method``."""
    tests = functions(*patterns)
    found: dict[str, list[str]] = {}
    for method in methods:
        name = method.rpartition(".")[2]
        found[method] = [t.label for t in tests if name in t.names or name in t.texts]
    return found


def of_commands(commands: Iterable[str], *patterns: str) -> dict[str, list[str]]:
    """Tests of each command, spelled in one string or as a list of words (without the program's name)."""
    tests = functions(*patterns)
    found: dict[str, list[str]] = {}
    for command in commands:
        words = re.compile(rf"(^|\s){re.escape(command.partition(' ')[2])}(\s|$)")
        found[command] = [t.label for t in tests if any(words.search(text) for text in t.texts)]
    return found


def of_routes(routes: Iterable[str], *patterns: str) -> dict[str, list[str]]:
    """Tests of each ``METHOD /path/{parameter}``; whatever fills a parameter matches it.

    A test may leave the head of the path to a variable (``f"{run.path}/operations/{id}"``), if two parts follow.
    """
    tests = functions(*patterns)
    # Most texts are in many tests, by their helpers: each is matched once.
    users: dict[str, set[int]] = {}
    for index, test in enumerate(tests):
        for text in test.texts:
            if "/" in text:
                users.setdefault(text, set()).add(index)
    found: dict[str, list[str]] = {}
    for route in routes:
        parts = re.split(r"(\{[^}]*\})", route.partition(" ")[2])
        pieces = [re.escape(part) if i % 2 == 0 else _WITH_SLASHES.get(part, r"[^/?]+") for i, part in enumerate(parts)]
        tails = ["".join(pieces), *("".join(pieces[i:]) for i in range(2, len(pieces)) if _is_distinctive(parts[i:]))]
        shape = re.compile(rf"^(\{{\}})?({'|'.join(tails)})(\?.*)?$")
        hits = set[int]().union(*(indices for text, indices in users.items() if shape.match(text)))
        found[route] = [tests[index].label for index in sorted(hits)]
    return found


def _is_distinctive(parts: list[str]) -> bool:
    return parts[0].startswith("/") and len([p for p in "".join(parts).split("/") if p]) >= 2
