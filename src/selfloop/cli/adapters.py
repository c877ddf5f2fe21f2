"""``selfloop export`` and ``selfloop import``: checkpoints out of a data directory, adapters into it."""

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from selfloop.cli import local, names, remote
from selfloop.control.resources.checkpoints.exports import Exported, ExportPlan
from selfloop.control.resources.checkpoints.imports import Imported


class ExportFormat(StrEnum):
    peft = "peft"
    merged = "merged"
    gguf = "gguf"


class GgufDtype(StrEnum):
    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"


def export(
    checkpoint: Annotated[str, typer.Argument(help=f"A trainer or sampler checkpoint: {names.FORMS_OF_A_CHECKPOINT}.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write; new or empty.")],
    to: Annotated[
        ExportFormat,
        typer.Option(
            "--to",
            help="peft: the adapter. merged: the base model with the adapter in it. gguf: the same for llama.cpp.",
        ),
    ],
    dtype: Annotated[GgufDtype | None, typer.Option(help="Of a GGUF's matrices. Default: that of the base.")] = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Write a checkpoint as a folder for PEFT, Transformers or llama.cpp."""

    with remote.failing_in_one_line():
        uri = names.checkpoint(checkpoint)

    async def work() -> tuple[ExportPlan, Exported]:
        async with local.opened(data_dir) as data:
            with local.progress() as report:
                plan = await data.exports.plan(
                    uri, folder, to.value, lambda stage: report(stage, 0.0), None if dtype is None else dtype.value
                )
            typer.echo(f"writing about {local.megabytes(plan.needed_bytes)} to {plan.target}", err=True)
            with local.progress() as report:
                return plan, await data.exports.write(plan, report)

    plan, done = local.run(work)
    if done.difference is not None:
        typer.echo(
            f"checked: logits differ from base + adapter by at most {done.difference:.2g} (allowed for {done.dtype}: "
            f"{done.tolerance:.2g}; the adapter moves them by up to {done.effect:.2g})",
            err=True,
        )
    remote.report(
        f"{plan.target}: {local.megabytes(done.size_bytes)}, {plan.format}, of {plan.base_model}",
        {
            "folder": str(plan.target),
            "format": plan.format,
            "base_model": plan.base_model,
            "size_bytes": done.size_bytes,
            "logit_difference": done.difference,
        },
        as_json,
    )


def import_adapter(
    folder: Annotated[Path, typer.Argument(help="A folder that the PEFT library wrote.")],
    base_model: Annotated[
        str | None, typer.Option(help="The base model as it is called here. Default: what the adapter names.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run. Default: the folder's.")] = None,
    team: Annotated[str | None, typer.Option(help="Team to own it. Default: the first team.")] = None,
    data_dir: local.DataDir = None,
    as_json: remote.AsJson = False,
) -> None:
    """Import a PEFT adapter as a trainer checkpoint, to train on from."""

    async def work() -> Imported:
        async with local.opened(data_dir) as data:
            with local.progress() as report:
                return await data.imports.add(folder, base_model=base_model, name=name, team=team, on_progress=report)

    done = local.run(work)
    typer.echo(f"rank {done.lora_rank}, alpha {done.lora_alpha:g}, of {done.base_model}", err=True)
    if done.changes_nothing:
        typer.echo("warning: it equals the base model: the adapter changes nothing (its A or B is zero)", err=True)
    remote.report(done.uri, asdict(done), as_json)
