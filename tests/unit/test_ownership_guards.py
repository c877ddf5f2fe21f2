"""Who may change what: an object is whole when it is made, and only its own module changes it afterwards."""

import ast
from collections import Counter
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

# Of the web framework, made to be assigned to.
NAMESPACES = {"app.state", "request.state"}

# Variables whose attributes are assigned in modules that do not declare them, and why that is right.
ALLOWED = {
    # The lifecycle's own record of what lives where, declared beside the worker groups, which only read it.
    "control/capacity/lifecycle.py": {"group", "member"},
    # Live rows: the journal and the outcomes keep a run's row in memory equal to the one they write.
    "control/queue/journal.py": {"run", "row"},
    "control/queue/outcomes.py": {"run"},
    "control/queue/run_queue.py": {"row"},
    # Rows that are made, and not yet added, in the same function.
    "control/resources/access.py": {"key"},
    "control/resources/runs.py": {"row"},
    "storage/db/queries_access.py": {"row"},
    # Objects of libraries, and a function that one reads, which are configured by assignment.
    "cli/options.py": {"described"},
    "server/openapi.py": {"app"},
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
    return {target for target, attribute in assigned(tree) if attribute not in own} - NAMESPACES


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


STATUS_WRITERS = {"control/capacity/lifecycle.py"}


def writes_a_status(path: Path) -> bool:
    """Whether a module changes the status of a row that is there."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == "status":
            return True
        called = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else ""
        if isinstance(node, ast.Call) and (called.startswith("update") or called in ("values", "setattr")):
            given = {keyword.arg for keyword in node.keywords}
            given |= {constant.value for constant in ast.walk(node) if isinstance(constant, ast.Constant)}
            if "status" in given:
                return True
    return False


def test_only_the_lifecycle_writes_a_status():
    paths = [path for room in ("control", "storage", "cli") for path in (SRC / room).rglob("*.py")]
    paths = [path for path in paths if "migrations" not in path.parts]
    assert {str(path.relative_to(SRC)) for path in paths if writes_a_status(path)} == STATUS_WRITERS


def constructions() -> Counter[str]:
    """How often something of each name is called in the sources."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in SRC.rglob("*.py")]
    calls = [node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = [node for node in calls if isinstance(node, ast.Name)]
    return Counter([node.id for node in names] + [node.attr for node in calls if isinstance(node, ast.Attribute)])


# Written by statements of their own, which add to what is there or count on from it.
NEVER_MADE = {"SkippedRow", "UsageRow", "DeploymentMinuteRow", "RunMetricRow"}


def test_rows_are_made_by_one_factory_each():
    tables = ast.parse((SRC / "storage" / "db" / "tables.py").read_text(encoding="utf-8"))
    rows = {node.name for node in tables.body if isinstance(node, ast.ClassDef) and node.name.endswith("Row")}
    made = constructions()
    assert {name: made[name] for name in rows if made[name] > 1} == {}
    assert {name for name in rows if not made[name]} == NEVER_MADE
