"""Who may change what: an object is whole when it is made, and only its own module changes it afterwards."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "selfloop"
ROOMS = ("control", "server", "worker", "storage", "cli")

modules = pytest.mark.parametrize(
    "path",
    sorted(path for room in ROOMS for path in (SRC / room).rglob("*.py")),
    ids=lambda path: str(path.relative_to(SRC)),
)

# Variables whose attributes are assigned in modules that do not declare them, and why that is right.
ALLOWED = {
    # Live rows: the journal and the outcomes keep a run's row in memory equal to the one they write.
    "control/queue/journal.py": {"run", "row"},
    "control/queue/outcomes.py": {"run"},
    "control/queue/scheduler.py": {"row"},
    # Rows that are made, and not yet added, in the same function.
    "control/resources/access.py": {"key"},
    "control/resources/checkpoints/imports.py": {"deployment"},
    "control/resources/checkpoints/sharing.py": {"deployment"},
    "control/resources/runs.py": {"run"},
    "control/sampling/durable_queue.py": {"row"},
    "storage/db/queries_access.py": {"row"},
    # Objects of libraries that are configured by assignment.
    "server/app.py": {"app.state"},
    "server/errors.py": {"app.state"},
    "server/hub/dialect.py": {"app.state"},
    "server/openapi.py": {"app"},
    "server/loops/trainer.py": {"request.state"},
    "server/shared/query_parameters.py": {"route"},
    "storage/db/backend.py": {"connection"},
    "worker/text/grammars.py": {"tokenizer"},
    # Messages of protocol buffers.
    "server/tinker/results.py": {"field", "message", "tensor"},
    "server/tinker/schema.py": {"field", "entry.options"},
    "server/tinker/sampling/targets.py": {"message", "message.sparse_csr"},
}


def declared(tree: ast.Module) -> set[str]:
    """Attributes that the module's own classes have."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            names |= {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_own(node.value):
            names.add(node.attr)
    return names


def assigned(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(object, attribute) of each assignment to something other than ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del) and not _is_own(node.value):
            yield ast.unparse(node.value), node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and not _is_own(node.args[0]):
            yield ast.unparse(node.args[0]), ""


def _is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def foreign(path: Path) -> set[str]:
    """Objects that a module changes though they are none of its own."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = declared(tree)
    return {target for target, attribute in assigned(tree) if attribute not in own}


@modules
def test_nothing_is_assigned_from_outside_after_construction(path: Path):
    assert foreign(path) <= ALLOWED.get(str(path.relative_to(SRC)), set())


def test_what_is_allowed_is_also_used():
    for name, targets in ALLOWED.items():
        assert foreign(SRC / name) == targets, name


def test_the_guard_sees_a_callback_set_from_outside(tmp_path: Path):
    module = tmp_path / "module.py"
    module.write_text(
        "class A:\n    def __init__(self, b):\n        self.x = 1\n        b.hook = print\n        b.x = 2\n"
    )
    assert foreign(module) == {"b"}
