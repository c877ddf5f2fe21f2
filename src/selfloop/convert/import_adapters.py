"""Adapters of other programs, as checkpoints of ours."""

from pathlib import Path

from selfloop.convert.reports import Facts, Report
from selfloop.engine.files.base_copies import BaseTensors
from selfloop.engine.files.checkpoint import write_sampler
from selfloop.engine.files.peft import read_foreign_peft
from selfloop.engine.models.registry import read_spec
from selfloop.engine.train.run import Run
from selfloop.types.digests import check_folder
from selfloop.types.errors import OperationFailed

# Of the whole, when what was read is written.
_READ = 0.75


def import_peft(adapter: Path, model_dir: Path, target: Path, report: Report) -> Facts:
    """An adapter of the PEFT library as a checkpoint of ours, at step 0 and without optimizer state."""
    report("read", 0.0)
    if not any(adapter.glob("*.safetensors")) and any(adapter.glob("*.bin")):
        raise OperationFailed(f"{adapter} has only pickled weights, which are never loaded; save safetensors")
    spec = read_spec(model_dir)
    check_folder(adapter)
    loaded = read_foreign_peft(adapter, spec, BaseTensors(model_dir, spec))
    report("write", _READ)
    size_bytes = write_sampler(target, Run(loaded.shape, loaded.alpha, loaded.theta_P))
    return {
        "size_bytes": size_bytes,
        "lora_rank": loaded.shape.rank,
        "lora_alpha": loaded.alpha,
        "targets": str(loaded.shape.targets),
        "changes_nothing": loaded.shape.changes_nothing(loaded.theta_P),
    }
