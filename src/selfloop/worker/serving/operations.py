"""From an operation to the engine's calls."""

import logging
from pathlib import Path

from selfloop.engine.engine import Engine
from selfloop.types.blob_ref import BlobRef
from selfloop.types.operation import (
    Forward,
    ForwardBackward,
    InitTrainer,
    LoadState,
    Operation,
    OptimStep,
    Save,
    SaveState,
    SaveWeightsExternal,
    SaveWeightsForSampler,
)
from selfloop.types.result import Probe, Result, SaveResult
from selfloop.types.status import CheckpointTarget
from selfloop.worker.protocol import Execute, OpenRun
from selfloop.worker.serving.encryption import encrypt_folder
from selfloop.worker.serving.replies import attempt, is_device_lost
from selfloop.worker.serving.staging import Staging

log = logging.getLogger("selfloop.worker")


def open_run(engine: Engine, staging: Staging, command: OpenRun) -> None:
    if command.snapshot is not None:
        engine.restore(command.run_id, staging.to_read(command.snapshot))
    else:
        engine.init_run(
            command.run_id,
            rank=command.lora_rank,
            seed=command.seed,
            initial=_to_read(staging, command.initial),
            with_optimizer=command.with_optimizer,
            targets=command.targets,
        )


def carry_out(engine: Engine, staging: Staging, context: Execute, operation: Operation) -> Result:
    """Whatever is not a loss. Raises what the engine raises, and then has changed nothing."""
    run_id = context.run_id
    match operation:
        case InitTrainer(lora_rank):
            return engine.init_run(
                run_id,
                rank=lora_rank,
                seed=context.seed,
                initial=_to_read(staging, context.initial),
                targets=context.targets,
            )
        case Forward() | ForwardBackward():
            raise AssertionError("a loss goes through the model with those of other runs")
        case OptimStep(adam):
            return engine.optim_step(run_id, adam)
        case LoadState(with_optimizer=with_optimizer):
            assert context.read_from is not None
            return engine.load_checkpoint(run_id, staging.to_read(context.read_from), with_optimizer=with_optimizer)
        case SaveState() | SaveWeightsForSampler() | SaveWeightsExternal():
            assert context.write_to is not None
            result = _save(engine, run_id, operation, staging.to_write(context.write_to))
            staging.written(context.write_to)
            return result


def _save(engine: Engine, run_id: str, operation: Save, folder: Path) -> SaveResult:
    match operation:
        case SaveState(checkpoint_id, name):
            saved = engine.save_trainer_checkpoint(run_id, folder)
            return SaveResult(checkpoint_id, name, CheckpointTarget.TRAINER, *saved)
        case SaveWeightsForSampler(checkpoint_id, name, publish=publish, sampler_id=sampler_id):
            saved = engine.save_sampler_checkpoint(run_id, folder)
            # In memory at once, so that the first sample need not read the files.
            engine.publish(run_id, checkpoint_id)
            probe = _probe(engine, run_id) if publish or sampler_id is not None else None
            return SaveResult(checkpoint_id, name, CheckpointTarget.SAMPLER, *saved, probe=probe)
        case SaveWeightsExternal(checkpoint_id, name, base_model, recipients):
            saved = engine.save_external_weights(run_id, folder, base_model)
            if recipients:
                saved = saved._replace(size_bytes=encrypt_folder(folder, recipients))
            return SaveResult(checkpoint_id, name, CheckpointTarget.EXTERNAL, *saved)


def _probe(engine: Engine, run_id: str) -> Probe | None:
    """What the weights are compared by; None where that cannot be computed, as the save stands in any case."""
    outcome = attempt(lambda: engine.probe(run_id))
    if not isinstance(outcome, Exception):
        return outcome
    if is_device_lost(outcome):
        raise outcome
    log.warning("the published weights cannot be compared with the sampler's", exc_info=outcome)
    return None


def _to_read(staging: Staging, ref: BlobRef | None) -> Path | None:
    return None if ref is None else staging.to_read(ref)
