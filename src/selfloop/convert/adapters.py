"""Takes adapters out of checkpoints and into them. Runs as a process of its own:

    python -m selfloop.convert.adapters peft CHECKPOINT MODEL TARGET --base-model NAME
    python -m selfloop.convert.adapters merged CHECKPOINT MODEL TARGET --base-model NAME
    python -m selfloop.convert.adapters gguf CHECKPOINT MODEL TARGET --base-model NAME [--dtype f32|f16|bf16]
    python -m selfloop.convert.adapters import ADAPTER MODEL TARGET

``MODEL`` is the base model's folder, ``TARGET`` a folder that does not exist yet. Stdout is JSON lines, as those of
:mod:`selfloop.convert.prepare`: progress, and last ``{"stage": "done", "fraction": 1.0, "facts": {...}}`` (exit 0) or
``{"error": "..."}`` (exit 1). At exit 0 ``TARGET`` is whole, checked and on disk; otherwise it is not there.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import NoReturn

from selfloop.convert.export_adapters import GGUF_DTYPES, export_gguf, export_merged, export_peft
from selfloop.convert.import_adapters import import_peft
from selfloop.convert.reports import Facts, exit_with_error, print_done, print_progress
from selfloop.types.errors import SelfloopError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selfloop.convert.adapters", description="Adapters out of and into files.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in ("peft", "merged", "gguf", "import"):
        arguments = kinds.add_parser(kind)
        arguments.add_argument("source", type=Path)
        arguments.add_argument("model", type=Path)
        arguments.add_argument("target", type=Path)
        if kind != "import":
            arguments.add_argument("--base-model", required=True)
        if kind == "gguf":
            arguments.add_argument("--dtype", choices=list(GGUF_DTYPES))
    return parser


def _work(args: argparse.Namespace) -> Facts:
    if args.kind == "import":
        return import_peft(args.source, args.model, args.target, print_progress)
    if args.kind == "gguf":
        return export_gguf(args.source, args.model, args.target, args.base_model, print_progress, args.dtype)
    export = export_peft if args.kind == "peft" else export_merged
    return export(args.source, args.model, args.target, args.base_model, print_progress)


def main(argv: list[str] | None = None) -> NoReturn:
    args = _parser().parse_args(argv)
    if args.target.exists():
        exit_with_error(f"{args.target} exists already")
    try:
        facts = _work(args)
        # Whoever does not hear of it (it was killed) would not know to take or to remove the folder.
        print_done(facts)
    except BaseException as error:
        shutil.rmtree(args.target, ignore_errors=True)
        if isinstance(error, SelfloopError | OSError):
            exit_with_error(error)
        raise
    sys.exit(0)


if __name__ == "__main__":
    main()
