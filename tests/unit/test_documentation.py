"""What the server offers is documented, and the documentation is what the server offers."""

import ast
import importlib.util
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
import typer
from pydantic import BaseModel

from asgi import app_for_documents
from selfloop.cli.main import app as cli
from selfloop.server.loops import wire
from selfloop.server.management import schemas
from selfloop.types.options import leaves
from selfloop.types.settings import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"

COMMANDS = {
    "selfloop chat": [
        "TARGET",
        "--data-dir",
        "--json",
        "--max-tokens",
        "--model",
        "--prompt",
        "--seed",
        "--system",
        "--temperature",
        "--url",
    ],
    "selfloop checkpoints": ["--data-dir", "--json", "--model", "--run", "--target", "--url"],
    "selfloop checkpoints delete": [
        "--data-dir",
        "--dry-run",
        "--json",
        "--keep-last",
        "--model",
        "--name",
        "--older-than",
        "--run",
        "--target",
        "--team",
        "--url",
        "--yes",
    ],
    "selfloop checkpoints deploy": ["CHECKPOINT", "--data-dir", "--json", "--name", "--url"],
    "selfloop checkpoints list": ["--data-dir", "--json", "--model", "--run", "--target", "--url"],
    "selfloop checkpoints download": ["CHECKPOINT", "FOLDER", "--data-dir", "--json", "--url"],
    "selfloop cluster drain": ["GROUP", "--data-dir", "--json", "--undo", "--url"],
    "selfloop cluster move": ["RUN_ID", "--data-dir", "--json", "--to", "--url"],
    "selfloop cluster status": ["--data-dir", "--json", "--url"],
    "selfloop demo": ["--data-dir", "--steps"],
    "selfloop doctor": ["--bench", "--data-dir", "--json", "--model", "--port", "--store", "--verify"],
    "selfloop exec": ["ARGUMENTS", "SCRIPT", "--data-dir", "--python", "--url"],
    "selfloop export": ["CHECKPOINT", "FOLDER", "--data-dir", "--dtype", "--json", "--to"],
    "selfloop import": ["FOLDER", "--base-model", "--data-dir", "--json", "--name", "--team"],
    "selfloop logs": ["ID", "--data-dir", "--follow", "--json", "--level", "--limit", "--url"],
    "selfloop keys create": ["NAME", "--data-dir", "--expires-in", "--json", "--role", "--team"],
    "selfloop keys list": ["--data-dir", "--json"],
    "selfloop keys revoke": ["KEY_ID", "--data-dir", "--json"],
    "selfloop keys rotate-links": ["--data-dir"],
    "selfloop migrate-database": ["--data-dir", "--database-url"],
    "selfloop backup": ["FOLDER", "--data-dir", "--verify"],
    "selfloop restore": ["FOLDER", "--data-dir", "--store", "--take-over"],
    "selfloop prune": ["--archive", "--data-dir", "--json", "--older-than", "--yes"],
    "selfloop models add": ["SOURCE", "--alias", "--data-dir", "--hub-url", "--json", "--name", "--revision"],
    "selfloop models fit": [
        "MODEL",
        "--activation-memory",
        "--base-dtype",
        "--context",
        "--data-dir",
        "--device",
        "--dtype",
        "--json",
        "--max-kv-tokens",
        "--memory",
        "--rank",
    ],
    "selfloop models list": ["--data-dir", "--json"],
    "selfloop runs": ["--data-dir", "--json", "--team", "--url"],
    "selfloop runs compare": ["FIRST", "SECOND", "--csv", "--data-dir", "--json", "--url"],
    "selfloop runs deactivate": ["RUN_ID", "--data-dir", "--json", "--url"],
    "selfloop runs list": ["--data-dir", "--json", "--team", "--url"],
    "selfloop runs show": ["RUN_ID", "--csv", "--data-dir", "--json", "--url"],
    "selfloop runs timeline": ["RUN_ID", "--data-dir", "--json", "--last", "--perfetto", "--url"],
    "selfloop runs track": ["RUN_ID", "--after", "--data-dir", "--to", "--url"],
    "selfloop runs watch": ["RUN_ID", "--data-dir", "--json", "--url"],
    "selfloop samplers": ["--data-dir", "--json", "--team", "--url"],
    "selfloop samplers deactivate": ["SAMPLER_ID", "--data-dir", "--json", "--url"],
    "selfloop samplers list": ["--data-dir", "--json", "--team", "--url"],
    "selfloop samplers show": ["SAMPLER_ID", "--data-dir", "--json", "--url"],
    "selfloop samplers wake": ["SAMPLER_ID", "--data-dir", "--json", "--url"],
    "selfloop serve": [
        "--activation-memory",
        "--base-dtype",
        "--body-memory",
        "--capacity",
        "--config",
        "--data-dir",
        "--database-url",
        "--deterministic",
        "--device",
        "--dtype",
        "--forward-cache",
        "--heartbeat-timeout",
        "--host",
        "--hub-url",
        "--keep-loaded",
        "--kept-memory",
        "--key-mib-per-second",
        "--key-open-requests",
        "--key-requests-per-second",
        "--launcher",
        "--log-format",
        "--max-adapters",
        "--max-kv-tokens",
        "--memory",
        "--metrics-public",
        "--num-threads",
        "--operation-timeout",
        "--port",
        "--prepare",
        "--print-config",
        "--public-url",
        "--serve-weights",
        "--serverless-max-rank",
        "--serverless-max-seq-len",
        "--session-timeout",
        "--snapshot-every",
        "--stable-reinforce",
        "--stop-grace",
        "--store",
        "--tls-cert",
        "--tls-key",
        "--train-token-budget",
        "--training-share",
        "--usd-per-gigabyte-month",
        "--usd-per-million-tokens",
        "--workers",
    ],
    "selfloop usage": ["--by", "--data-dir", "--json", "--since", "--team", "--url"],
}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    sys.path.insert(0, str(DOCS))  # as when it is run as a script
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_the_command_line_is_frozen(generator: ModuleType):
    """A script that works with this version works with the next: change the list with the changelog."""
    found: dict[str, list[str]] = {}
    for name, command in generator.walk(typer.main.get_command(cli), "selfloop"):
        arguments = [p for p in command.params if p.name != "help"]
        words = sorted(p.name.upper() if p.param_type_name == "argument" else p.opts[0] for p in arguments)
        found[name] = sorted(words, key=lambda word: (word.startswith("--"), word))
    assert found == COMMANDS


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_generated_parts_are_up_to_date(generator: ModuleType, name: str):
    assert generator.generated(page(name)) == page(name), "run `make docs`"


def test_the_example_of_a_configuration_file_is_up_to_date(generator: ModuleType):
    for path, content in generator.FILES.items():
        assert path.read_text(encoding="utf-8") == content(), "run `make docs`"


def test_every_option_is_documented():
    text = page("operations.md")
    for command, arguments in COMMANDS.items():
        assert f"`{command}`" in text
        for argument in arguments:
            assert f"`{argument}`" in text, (command, argument)


def test_every_environment_variable_is_documented():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    of_options = {leaf.env for leaf in leaves(Settings)}
    for name in of_options | set(re.findall(r"\bSELFLOOP_[A-Z_]+", code)):
        assert f"`{name}`" in page("operations.md"), name


def test_every_route_is_documented():
    settings = Settings("127.0.0.1", 8000, Path("unused"))
    paths = app_for_documents(settings).openapi()["paths"]
    text = page("compatibility.md") + page("operations.md")
    for path, methods in paths.items():
        for method in methods:
            assert f"`{method.upper()} {path}`" in text, (method, path)


def test_every_route_is_proven(generator: ModuleType):
    assert [row for row in generator.routes().splitlines() if row.endswith("| - |")] == []


def test_every_method_and_command_of_the_clients_is_proven(generator: ModuleType):
    assert [row for row in generator.methods().splitlines() if row.endswith("| - |")] == []


def request_fields() -> list[str]:
    """Every field that a request of ours may carry, as ``Schema.field``."""
    found = [
        f"{kind.__name__}.{field}"
        for module in pkgutil.iter_modules(schemas.__path__, f"{schemas.__name__}.")
        for kind in vars(importlib.import_module(module.name)).values()
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind.model_config.get("extra") == "forbid"
        for field in kind.model_fields
    ]
    bodies = [
        kind
        for kind in vars(wire).values()
        if isinstance(kind, type)
        and issubclass(kind, msgspec.Struct)
        and kind.__module__ == wire.__name__
        and kind.__struct_config__.forbid_unknown_fields
    ]
    return found + [f"{kind.__name__}.{field.name}" for kind in bodies for field in msgspec.structs.fields(kind)]


@pytest.mark.parametrize("field", request_fields())
def test_every_request_field_is_owned(field: str):
    """Obeyed or refused, and the page says which."""
    assert f"`{field.rpartition('.')[2]}`" in page("compatibility.md")


@pytest.mark.parametrize("client", ["baseten", "baseten-loops", "baseten-loops-tinker", "truss"])
def test_every_field_of_the_clients_is_owned(generator: ModuleType, client: str):
    """What a client can say reaches a field of ours, or the table says why not."""
    surface, tables = generator.client_surface(client), generator.client_owners()
    models, parameters = tables[client].get("models", {}), tables[client].get("parameters", {})
    if client == "baseten-loops-tinker":  # a face on the other client's parameters
        parameters = tables["baseten-loops"]["parameters"] | parameters
    ours = set(request_fields()) | set(query_fields())
    owners: dict[str, str] = {}
    for model, fields in surface.get("fields", {}).items():
        owner = models[model]
        said = [name for name in fields if name != "type"]  # the tag of a kind of chunk
        owners |= {f"{model}.{name}": owner if owner == "refused" else f"{owner}.{name}" for name in said}
    if client != "baseten":  # whose methods take ids of the path, and models
        said = [*surface.get("methods", {}).values(), *surface.get("commands", {}).values()]
        owners |= {name: parameters[name] for names in said for name in names}
    for field, owner in owners.items():
        if owner in ("client", "refused", "not sent") or owner.startswith(("header ", "path of ")):
            continue
        assert owner in ours, f"{client}: {field} is said to be owned by {owner}, which does not exist"


def query_fields() -> list[str]:
    """Every query parameter as ``METHOD /path.name``, and every route as itself."""
    paths = app_for_documents().openapi()["paths"]
    found: list[str] = []
    for path, methods in paths.items():
        for method, operation in methods.items():
            route = f"{method.upper()} {path}"
            found += [route, *(f"{route}.{p['name']}" for p in operation.get("parameters", []) if p["in"] == "query")]
    return found


def test_links_lead_somewhere():
    pages = [*DOCS.rglob("*.md"), *ROOT.glob("*.md")]
    for file in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_the_glossary_names_what_exists():
    text = page("glossary.md")
    source = ROOT / "src" / "selfloop"
    modules = set(re.findall(r"`([\w/]+\.py)`", text))
    classes = re.findall(r"`(\w+)`\s+in\s+`([\w/]+\.py)`", text)
    assert len(classes) > 30
    assert [path for path in modules if not (source / path).is_file()] == []
    defined = {
        path: {node.name for node in ast.parse((source / path).read_text()).body if isinstance(node, ast.ClassDef)}
        for path in modules
    }
    assert [(name, path) for name, path in classes if name not in defined[path]] == []


def test_the_glossary_is_in_alphabetical_order():
    terms = [term.lower() for term in re.findall(r"^- \*\*(.+?)\*\*:", page("glossary.md"), re.MULTILINE)]
    assert len(terms) > 50
    assert terms == sorted(terms)
