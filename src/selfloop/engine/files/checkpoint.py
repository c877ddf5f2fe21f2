"""A run's files.

Sampler checkpoint: the PEFT adapter and ``selfloop.json``. Trainer checkpoint: that and ``optimizer.safetensors``.
Snapshot: ``selfloop.json`` and ``run.safetensors``, i.e. the whole state, bit for bit, as flat as it is computed with.
"""

from pathlib import Path

import msgspec
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from selfloop.engine.files.directory import DirectoryWriter
from selfloop.engine.files.peft import read_peft, write_peft
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.stored import in_stored_order
from selfloop.engine.train.run import Accumulated, ComputedIn, Moments, Run
from selfloop.types.digests import check_folder, damaged
from selfloop.types.errors import OperationFailed
from selfloop.types.lora import LoraTargets

STATE_FILE = "selfloop.json"
OPTIMIZER_FILE = "optimizer.safetensors"
SNAPSHOT_FILE = "run.safetensors"
# Families of which snapshots without a layout are as those with one; of others they are in the order of their tensors.
_LAID_OUT_ALIKE = frozenset({"llama", "mistral", "qwen2", "qwen3", "qwen3_moe"})
# Of snapshots that versions before wrote, which are trainer checkpoints otherwise.
_GRADIENTS_FILE = "gradients.safetensors"


class AccumulatedState(msgspec.Struct, frozen=True):
    """What is beside the gradients; see :class:`Accumulated`."""

    num_tokens: int
    normalised: bool
    num_pairs: int | None = None


class RunState(msgspec.Struct, frozen=True):
    """``selfloop.json``: the scalars of a run; no ``targets`` are the usual ones.

    ``layout`` is that of a snapshot's flat vectors (:attr:`AdapterShape.layout`); ``computed_in``: see :class:`Run`.
    """

    step: int
    lora_rank: int
    lora_alpha: float
    num_updates: int = 0
    accumulated: AccumulatedState | None = None
    format: int = 1
    targets: str | None = None
    layout: str | None = None
    computed_in: ComputedIn | None = None


def write_sampler(directory: Path, run: Run) -> int:
    """Adapter and step only; returns bytes written."""
    writer = DirectoryWriter(directory)
    write_peft(writer, run.shape, run.theta_P, run.alpha)
    writer.json(STATE_FILE, _state_of(run))
    return writer.seal()


def write_external(directory: Path, run: Run, base_model: str) -> int:
    """The adapter alone, as PEFT reads it, with the name of its base model; returns bytes written."""
    writer = DirectoryWriter(directory)
    write_peft(writer, run.shape, run.theta_P, run.alpha, base_model)
    return writer.seal()


def write_trainer(directory: Path, run: Run) -> int:
    """Adapter, moments and step; returns bytes written."""
    writer = DirectoryWriter(directory)
    write_peft(writer, run.shape, run.theta_P, run.alpha)
    writer.json(STATE_FILE, msgspec.structs.replace(_state_of(run), num_updates=_write_moments(writer, run)))
    return writer.seal()


def write_snapshot(directory: Path, run: Run) -> int:
    """Everything, accumulated gradients included; returns bytes written."""
    writer = DirectoryWriter(directory)
    tensors, pending = {"theta": run.theta_P}, run.accumulated
    if run.moments is not None:
        tensors |= {"exp_avg": run.moments.mean_P, "exp_avg_sq": run.moments.square_P}
    if pending is not None:
        tensors["grad"] = pending.grad_P
    writer.whole_tensors(SNAPSHOT_FILE, tensors)
    state = msgspec.structs.replace(
        _state_of(run),
        num_updates=0 if run.moments is None else run.moments.num_updates,
        accumulated=None
        if pending is None
        else AccumulatedState(pending.num_tokens, pending.normalised, pending.num_pairs),
        layout=run.shape.layout,
    )
    writer.json(STATE_FILE, state)
    return writer.seal()


def _state_of(run: Run) -> RunState:
    targets, computed_in = str(run.shape.targets), run.computed_in
    return RunState(run.step, run.shape.rank, run.alpha, targets=targets, computed_in=computed_in)


def read_weights(directory: Path, spec: ModelSpec, device: torch.device) -> Run:
    """A run that starts from a checkpoint's weights: step 0, no moments, no gradients.

    Raises:
        CheckpointDamaged: a file is not what was written.
        OperationFailed: files are missing or do not fit the model.
    """
    check_folder(directory)
    path = directory / STATE_FILE
    # An adapter of another program has no such file: it may adapt anything.
    state = _decode_state(path) if path.is_file() else None
    targets = None if state is None or state.targets is None else LoraTargets.parse(state.targets)
    loaded = read_peft(directory, spec, targets)
    computed_in = None if state is None else state.computed_in
    return Run(loaded.shape, loaded.alpha, loaded.theta_P.to(device), computed_in=computed_in)


def read_trainer(directory: Path, spec: ModelSpec, device: torch.device) -> Run:
    """A run with a trainer checkpoint's weights, moments and step, without gradients."""
    run = read_weights(directory, spec, device)
    state = _read_state(directory, run)
    run.step = state.step
    if state.num_updates > 0:
        tensors = _read_tensors(directory / OPTIMIZER_FILE)
        mean_P = _flat(run.shape, "exp_avg", tensors).to(device)
        square_P = _flat(run.shape, "exp_avg_sq", tensors).to(device)
        run.moments = Moments(mean_P, square_P, state.num_updates)
    elif not (directory / OPTIMIZER_FILE).is_file():
        raise OperationFailed(
            f"no {OPTIMIZER_FILE}: this is an imported or a sampler's checkpoint, not a trainer checkpoint with "
            "its optimizer; load its weights alone",
            "CheckpointInvalid",
        )
    return run


def read_snapshot(directory: Path, spec: ModelSpec, device: torch.device) -> Run:
    """The run as it was when :func:`write_snapshot` wrote it.

    Raises:
        CheckpointDamaged: it is gone, or a file of it is not what was written.
    """
    if not directory.is_dir():
        raise damaged(directory, "the folder is gone")
    check_folder(directory)
    if not (directory / SNAPSHOT_FILE).is_file():
        return _read_named_snapshot(directory, spec, device)
    state = _decode_state(directory / STATE_FILE)
    shape = AdapterShape(spec, state.lora_rank, LoraTargets.parse(state.targets))
    written = _layout_of(state, shape, spec)
    tensors = _read_tensors(directory / SNAPSHOT_FILE)

    def flat(name: str) -> Tensor:
        if name not in tensors or tensors[name].shape != (shape.num_parameters,):
            raise OperationFailed(f"the snapshot lacks {name} in the right shape", "CheckpointInvalid")
        if written is not shape:
            return shape.rearranged(tensors[name], written).to(device)
        # Of its own: what was read may be the file itself, mapped.
        return tensors[name].to(device, copy=True)

    run = Run(shape, state.lora_alpha, flat("theta"), state.step, computed_in=state.computed_in)
    if state.num_updates > 0:
        run.moments = Moments(flat("exp_avg"), flat("exp_avg_sq"), state.num_updates)
    pending = state.accumulated
    if pending is not None:
        run.accumulated = Accumulated(flat("grad"), pending.num_tokens, pending.normalised, pending.num_pairs)
    return run


def computed_in(directory: Path) -> ComputedIn | None:
    """What the numbers of a checkpoint were computed in; None where that is not known.

    Raises:
        OperationFailed: its state cannot be read.
    """
    path = directory / STATE_FILE
    return _decode_state(path).computed_in if path.is_file() else None


def _layout_of(state: RunState, shape: AdapterShape, spec: ModelSpec) -> AdapterShape:
    """How the snapshot's vectors are laid out: as ``shape``, or as before a family described the model."""
    if state.layout == shape.layout or (state.layout is None and spec.model_type in _LAID_OUT_ALIKE):
        return shape
    before = AdapterShape(in_stored_order(spec), state.lora_rank, shape.targets)
    if state.layout in (before.layout, None):
        return before
    raise OperationFailed("the snapshot's parameters are laid out as this version does not know", "CheckpointInvalid")


def _read_named_snapshot(directory: Path, spec: ModelSpec, device: torch.device) -> Run:
    """One of a version before."""
    run = read_trainer(directory, spec, device)
    pending = _read_state(directory, run).accumulated
    if pending is not None:
        grad_P = _flat(run.shape, "grad", _read_tensors(directory / _GRADIENTS_FILE)).to(device)
        run.accumulated = Accumulated(grad_P, pending.num_tokens, pending.normalised, pending.num_pairs)
    return run


def _write_moments(writer: DirectoryWriter, run: Run) -> int:
    """The file is there even when empty: it tells a trainer checkpoint from a sampler's."""
    if run.moments is None:
        writer.tensors(OPTIMIZER_FILE, {})
        return 0
    tensors = _named(run.shape, "exp_avg", run.moments.mean_P)
    writer.tensors(OPTIMIZER_FILE, tensors | _named(run.shape, "exp_avg_sq", run.moments.square_P))
    return run.moments.num_updates


def _named(shape: AdapterShape, prefix: str, flat_P: Tensor) -> dict[str, Tensor]:
    return {f"{prefix}.{parameter.name}": parameter.view for parameter in shape.named(flat_P)}


def _flat(shape: AdapterShape, prefix: str, tensors: dict[str, Tensor]) -> Tensor:
    flat_P = torch.zeros(shape.num_parameters)
    for parameter in shape.named(flat_P):
        name = f"{prefix}.{parameter.name}"
        if name not in tensors or tensors[name].shape != parameter.view.shape:
            raise OperationFailed(f"the checkpoint lacks {name} in the right shape", "CheckpointInvalid")
        parameter.view.copy_(tensors[name])
    return flat_P


def _read_state(directory: Path, run: Run) -> RunState:
    path = directory / STATE_FILE
    if not path.is_file():
        raise OperationFailed(f"no {STATE_FILE} in the checkpoint", "CheckpointInvalid")
    state = _decode_state(path)
    if state.lora_rank != run.shape.rank:
        raise OperationFailed(f"{STATE_FILE} and the adapter disagree on the rank", "CheckpointInvalid")
    return state


def _decode_state(path: Path) -> RunState:
    try:
        return msgspec.json.decode(path.read_bytes(), type=RunState)
    except msgspec.DecodeError as error:
        raise OperationFailed(f"{STATE_FILE} cannot be read: {error}", "CheckpointInvalid") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise OperationFailed(f"no {path.name} in the checkpoint", "CheckpointInvalid")
    try:
        return safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise OperationFailed(f"{path.name} cannot be read: {error}", "CheckpointInvalid") from error
