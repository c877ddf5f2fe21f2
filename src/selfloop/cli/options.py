"""A command whose options are those of a tree of settings."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from selfloop.types.option_values import SWITCH, text_of
from selfloop.types.options import Leaf, leaves

CONFIG_ENV = "SELFLOOP_CONFIG"
_FILE = "Configuration file"


def command_of(
    root: type[Any], run: Callable[[Mapping[str, str], Path | None, bool], None], help: str
) -> Callable[..., None]:
    """A function that typer makes a command of.

    Args:
        root: of the tree.
        run: gets the texts of the options that were given, by their keys; the file of ``--config``; and whether the
            settings are only to be printed.
        help: what the command does.
    """
    options = [leaf for leaf in leaves(root) if leaf.option.flag]
    renamed = [(leaf, leaf.former) for leaf in options if leaf.former is not None]

    def command(config: Path | None, print_config: bool, **given: str | bool | None) -> None:
        texts = {key: text_of(value) for key, value in given.items() if value is not None}
        for leaf, former in renamed:
            if (text := texts.pop(former.key, None)) is not None:
                texts.setdefault(leaf.key, text)
        run(texts, config, print_config)

    file: Any = Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            rich_help_panel=_FILE,
            help="TOML file of options, by table and name: docs/operations.md. What the command line or the "
            f"environment says wins over it. Default: ${CONFIG_ENV}.",
            envvar=CONFIG_ENV,
            show_envvar=False,
        ),
    ]
    shown: Any = Annotated[
        bool,
        typer.Option(
            "--print-config",
            rich_help_panel=_FILE,
            help="Print the settings as such a file, with where each value comes from, and end.",
        ),
    ]
    parameters = [_parameter(leaf) for leaf in options]
    parameters += [_parameter(former, hidden=True) for _, former in renamed]
    parameters += [_keyword("config", file, None), _keyword("print_config", shown, False)]
    # What typer looks at.
    described: Any = command
    described.__signature__ = inspect.Signature(parameters)
    described.__annotations__ = {each.name: each.annotation for each in parameters}
    described.__doc__ = help
    return command


def _parameter(leaf: Leaf, *, hidden: bool = False) -> inspect.Parameter:
    is_switch = leaf.kind is SWITCH
    spelled = f"{leaf.flag}/--no-{leaf.name}" if is_switch else leaf.flag
    kind: Any = bool if is_switch else str
    described = typer.Option(
        spelled,
        hidden=hidden,
        help=leaf.help,
        metavar=None if is_switch else leaf.kind.word,
        rich_help_panel=leaf.group.title,
        show_default=False,
    )
    return _keyword(leaf.key, Annotated[kind | None, described], None)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
