"""Writes the parts of the documentation that are read out of the code; ``--check`` only compares.

A part is between ``<!-- generated: NAME -->`` and ``<!-- end -->``.
"""

import argparse
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import proofs
import typer

from selfloop.cli.main import app as cli
from selfloop.control.gateway import Control
from selfloop.server.app import make_app
from selfloop.types.losses import LOSSES
from selfloop.types.option_sources import by_table, load, to_toml
from selfloop.types.options import leaves
from selfloop.types.settings import Settings

DOCS = Path(__file__).parent
_ROUTE_TESTS = ("contract/*.py", "system/*.py", "unit/server/*.py", "clients/*.py", "fuzz/*.py")
_CLIENT_TESTS = {
    "baseten": ("clients/test_baseten*.py",),
    "baseten-loops": (
        "clients/scripts/loops_checks/*.py",
        "clients/scripts/imported_checks.py",
        "clients/scripts/custom_loss_checks.py",
    ),
    "baseten-loops-tinker": ("clients/scripts/*shim*.py", "clients/test_loops_tinker_shim.py"),
    "truss": ("clients/test_truss.py",),
}
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def routes() -> str:
    """Every route of the server with a test of it, by room."""
    settings = Settings(host="127.0.0.1", port=8000, data_dir=Path("unused"))
    paths: dict[str, dict[str, Any]] = make_app(settings, cast(Control, None)).openapi()["paths"]
    operations = {
        f"{method.upper()} {path}": found for path, methods in paths.items() for method, found in methods.items()
    }
    tests = proofs.of_routes(operations, *_ROUTE_TESTS)
    for route, found in _through_the_client().items():
        tests[route] = tests[route] or found
    rows = ["| route | | what it is for | proven by |", "| --- | --- | --- | --- |"]
    for route, operation in operations.items():
        rows.append(f"| `{route}` | {operation['tags'][0]} | {_purpose(operation)} | {_proof(tests[route])} |")
    return "\n".join(rows)


def _operations() -> dict[str, dict[str, Any]]:
    """The OpenAPI document's operations, as ``METHOD /path``."""
    settings = Settings(host="127.0.0.1", port=8000, data_dir=Path("unused"))
    paths: dict[str, dict[str, Any]] = make_app(settings, cast(Control, None)).openapi()["paths"]
    return {f"{method.upper()} {path}": found for path, kinds in paths.items() for method, found in kinds.items()}


def methods() -> str:
    """Every method and command of the official clients with a test of it."""
    rows = ["| client | method or command | proven by |", "| --- | --- | --- |"]
    for client, patterns in _CLIENT_TESTS.items():
        surface = client_surface(client)
        tests = proofs.of_methods(called(surface), *patterns) | proofs.of_commands(
            surface.get("commands", {}), *patterns
        )
        rows += [f"| {client} | `{name}` | {_proof(found)} |" for name, found in tests.items()]
    return "\n".join(rows)


def owners() -> str:
    """The owner of each field and parameter that a client can send."""
    rows = ["| client | field or parameter | owner here |", "| --- | --- | --- |"]
    for client, kinds in client_owners().items():
        fields = client_surface(client).get("fields", {})
        for model, owner in kinds.get("models", {}).items():
            said = ", ".join(f"`{name}`" for name in fields.get(model, []))
            rows.append(f"| {client} | {model}: {said} | {_owner(owner)}, by the same names |")
        rows += [f"| {client} | `{name}` | {_owner(owner)} |" for name, owner in kinds.get("parameters", {}).items()]
    return "\n".join(rows)


def _through_the_client() -> dict[str, list[str]]:
    """Tests of the management client's methods, by the route that a method calls."""
    called_routes = client_surface("baseten")["routes"]
    tests = proofs.of_methods(called_routes, *_CLIENT_TESTS["baseten"])
    known = {re.sub(r"\{[^}]*\}", "{}", route): route for route in _operations()}
    return {known[f"{verb} {path}"]: tests[name] for name, (verb, path) in called_routes.items()}


def client_surface(client: str) -> dict[str, dict[str, list[str]]]:
    """What the client offers; ``docs/clients/surface.py`` wrote it."""
    return json.loads((DOCS / "clients" / f"{client}.json").read_text(encoding="utf-8"))


def client_owners() -> dict[str, dict[str, dict[str, str]]]:
    return tomllib.loads((DOCS / "clients" / "owners.toml").read_text(encoding="utf-8"))


def called(surface: dict[str, dict[str, list[str]]]) -> list[str]:
    """Methods that a script calls by name."""
    return [name for name in surface.get("methods", {}) if not name.endswith("__init__")]


def _owner(owner: str) -> str:
    return owner if owner in ("client", "refused", "not sent") else f"`{owner}`"


def _proof(tests: list[str]) -> str:
    return f"`{tests[0]}`" if tests else "-"


def _purpose(operation: dict[str, Any]) -> str:
    """The summary that we wrote (it is a sentence), else the description, else the name."""
    summary = str(operation["summary"])
    text = summary if summary.endswith(".") else str(operation.get("description") or summary)
    return first_line(text).rstrip(".").replace("``", "`")


def losses() -> str:
    """Every loss with its inputs and its configuration."""
    rows = ["| loss | inputs besides `target_tokens` | configuration, with defaults |", "| --- | --- | --- |"]
    for spec in LOSSES.values():
        inputs = [f"`{name}`" for name in spec.required] + [f"`{name}` (optional)" for name in spec.optional]
        if spec.one_of:
            inputs.insert(len(spec.required), " or ".join(f"`{name}`" for name in spec.one_of))
        config = [f"`{name}` = {str(value).lower()}" for name, value in spec.config.items()]
        rows.append(f"| `{spec.name}` | {', '.join(inputs) or '-'} | {', '.join(config) or '-'} |")
    return "\n".join(rows)


def commands() -> str:
    """Every command with its arguments and options."""
    rows = ["| command | what it does |", "| --- | --- |"]
    details: list[str] = []
    in_tree = {each.key for leaf in leaves(Settings) for each in (leaf, leaf.former) if each is not None}
    for name, command in walk(typer.main.get_command(cli), "selfloop"):
        rows.append(f"| `{name}` | {first_line(command.help)} |")
        for parameter in command.params:
            if parameter.name != "help" and not (name == "selfloop serve" and parameter.name in in_tree):
                details.append(f"| `{name}` | {_spelling(parameter)} | {_meaning(parameter)} |")
    return "\n".join([*rows, "", "| command | argument | meaning |", "| --- | --- | --- |", *details])


def options(root: type[Any] = Settings) -> str:
    """Every option of ``selfloop serve``, a table for each group."""
    parts: list[str] = []
    heading = ""
    for leaf in by_table(leaves(root)):
        if leaf.group.title != heading:
            heading = leaf.group.title
            table = f", in a file `[{leaf.group.table}]`" if leaf.group.table else ", in a file without a table"
            parts += ["", f"**{heading}**{table}", "", "| option | environment | what it does | default | values |"]
            parts.append("| --- | --- | --- | --- | --- |")
        spelled = f"`{leaf.flag}`" if leaf.option.flag else f"`{leaf.key}`, never on the command line"
        default = leaf.default_text if leaf.default is None else f"`{leaf.default_text}`"
        parts.append(f"| {spelled} | `{leaf.env}` | {leaf.option.help} | {default or '-'} | {leaf.expected} |")
    return "\n".join(parts[1:])


def example_settings() -> str:
    """A file for ``selfloop serve --config`` with every option and its default."""
    head = "# For `selfloop serve --config`: every option with its default. One without a value is a comment."
    made_by = "# docs/operations.md explains the file. Written by docs/generate.py."
    return f"{head}\n{made_by}\n\n{to_toml(load(Settings, {}, {}, None), with_help=True)}"


def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The commands of the tree, with their full names; a group that does something by itself is one, too."""
    inner: dict[str, Any] = getattr(command, "commands", {})
    if not inner or (command.invoke_without_command and name != "selfloop"):
        yield name, command
    for word, sub in inner.items():
        yield from walk(sub, f"{name} {word}")


def first_line(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _meaning(parameter: Any) -> str:
    text = str(getattr(parameter, "help", None) or "")
    default = parameter.default
    if parameter.param_type_name == "argument" or default is None or default is False:
        return text
    return f"{text} On by default." if default is True else f"{text} Default: `{default}`."


def families() -> str:
    """How far each family's numbers are from those of transformers and PEFT; ``tests/family_parity.py`` measured it."""
    columns = {
        "logits": "logits",
        "loss": "loss",
        "gradients": "gradients",
        "steps": "five steps",
        "cached": "cached",
        "together": "two runs",
    }
    rows = [f"| `model_type` | computed by | {' | '.join(columns.values())} | replayed | greedy |"]
    rows.append(f"| {' | '.join(['---'] * (len(columns) + 4))} |")
    measured: dict[str, dict[str, Any]] = json.loads((DOCS / "family_parity.json").read_text(encoding="utf-8"))
    for family, found in measured.items():
        if "refused" in found:
            rows.append(f"| `{family}` | refused: {found['refused']} | {'| ' * (len(columns) + 2)}")
            continue
        numbers = [f"{found[name]:.0e}" if found[name] else "0" for name in columns]
        numbers += ["same" if found[name] else "others" for name in ("replayed", "greedy")]
        rows.append(f"| `{family}` | {found['computed_by']} | {' | '.join(numbers)} |")
    return "\n".join(rows)


def sizes() -> str:
    """What well-known models take of a GPU; ``docs/model_sizes/plan.py`` wrote it down."""
    plans: dict[str, dict[str, Any]] = json.loads((DOCS / "model_sizes" / "plans.json").read_text(encoding="utf-8"))
    memories = list(next(iter(plans.values()))["longest"])
    head = ["model", "parameters", "backend", "base weights", "one run", *(f"{size} GB" for size in memories)]
    rows = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for name, plan in plans.items():
        found = [f"`{name}`", f"{plan['num_parameters'] / 1e9:.2f}B", plan["backend"]]
        found += [f"{plan[key] / 1e9:.1f} GB" for key in ("weights_bytes", "run_bytes")]
        found += [" / ".join(f"{num:,}" if num > 0 else "-" for num in pair) for pair in plan["longest"].values()]
        rows.append(f"| {' | '.join(found)} |")
    return "\n".join(rows)


PARTS: dict[str, Callable[[], str]] = {
    "sizes": sizes,
    "routes": routes,
    "methods": methods,
    "owners": owners,
    "losses": losses,
    "commands": commands,
    "options": options,
    "families": families,
}
FILES: dict[Path, Callable[[], str]] = {DOCS.parent / "deploy" / "selfloop.toml": example_settings}


def generated(text: str) -> str:
    """``text`` with its generated parts made anew."""
    return _PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    check = parser.parse_args().check
    stale: list[str] = []
    for page in [*sorted(DOCS.glob("*.md")), *FILES]:
        before = page.read_text(encoding="utf-8") if page.exists() else ""
        after = FILES[page]() if page in FILES else generated(before)
        if before != after:
            stale.append(page.name)
            if not check:
                page.write_text(after, encoding="utf-8")
    if stale:
        print(f"{'out of date' if check else 'written'}: {', '.join(stale)}")
    if stale and check:
        sys.exit("run `make docs`")


if __name__ == "__main__":
    main()
