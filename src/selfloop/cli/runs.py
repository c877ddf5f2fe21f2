"""``selfloop runs``: what was trained in a data directory."""

from datetime import datetime

from rich.table import Table

from selfloop.cli import local


def runs(data_dir: local.DataDir = None) -> None:
    """List the runs, newest first."""

    async def work() -> Table:
        async with local.opened(data_dir) as data:
            table = local.table("run", "name", "base model", "status", "steps", "rank", "created")
            for row in await data.all_runs():
                created = datetime.fromtimestamp(row.created_at).strftime("%Y-%m-%d %H:%M")
                table.add_row(row.id, row.name, row.base_model, row.status, str(row.step), str(row.lora_rank), created)
            return table

    local.show(local.run(work))
