"""Writes the parts of the documentation that are read out of the code; ``--check`` only compares.

A part lies between ``<!-- generated: NAME -->`` and ``<!-- end -->``.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import typer

from selfloop.cli.main import app as cli
from selfloop.control.control import Control
from selfloop.server.app import make_app
from selfloop.server.settings import Settings
from selfloop.types.losses import LOSSES

DOCS = Path(__file__).parent
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def routes() -> str:
    """Every route of the server, one row each, by room."""
    settings = Settings(host="127.0.0.1", port=8000, data_dir=Path("unused"))
    paths: dict[str, dict[str, Any]] = make_app(settings, cast(Control, None)).openapi()["paths"]
    rows = ["| route | | what it is for |", "| --- | --- | --- |"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            rows.append(f"| `{method.upper()} {path}` | {operation['tags'][0]} | {_purpose(operation)} |")
    return "\n".join(rows)


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
    for name, command in walk(typer.main.get_command(cli), "selfloop"):
        rows.append(f"| `{name}` | {first_line(command.help)} |")
        for parameter in command.params:
            if parameter.name != "help":
                details.append(f"| `{name}` | {_spelling(parameter)} | {_meaning(parameter)} |")
    return "\n".join([*rows, "", "| command | argument | meaning |", "| --- | --- | --- |", *details])


def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The leaves of the command tree, with their full names."""
    inner: dict[str, Any] = getattr(command, "commands", {})
    if not inner:
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


PARTS: dict[str, Callable[[], str]] = {"routes": routes, "losses": losses, "commands": commands}


def generated(text: str) -> str:
    """``text`` with its generated parts made anew."""
    return _PART.sub(lambda match: f"{match[1]}{PARTS[match[2]]()}\n{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    check = parser.parse_args().check
    stale: list[str] = []
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = generated(before)
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
