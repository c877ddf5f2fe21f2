"""A save that does not fit is refused before anything is written, and what comes after it goes on."""

import json
import time
from pathlib import Path

import pytest

from fake_house import RUN_ID, FakeHouse
from selfloop.control.data_dir.disk_space import SPARE_BYTES
from selfloop.control.queue.operations import Pending
from selfloop.control.queue.outcomes import Outcome
from selfloop.storage.db.tables import ModelRow
from selfloop.types.lora import LoraTargets
from selfloop.types.lora_size import parameters_per_rank, save_bytes
from selfloop.types.operation import AdamParams, OptimStep, SaveState

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    return folder


async def outcome(house: FakeHouse, id: str) -> Outcome:
    found = await house.operations.wait(RUN_ID, id, 10.0)
    assert not isinstance(found, Pending)
    return found


async def test_a_save_that_does_not_fit_is_refused_and_the_run_goes_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await FakeHouse.open(tmp_path)
    async with house.db.write() as session:
        session.add(ModelRow(name="tiny", source="folder", path=str(model), created_at=time.time()))
    needed = save_bytes(model, 8, LoraTargets(), with_optimizer=True)
    free = needed + SPARE_BYTES - 1
    monkeypatch.setattr(house.blobs, "free_bytes", lambda: free)
    try:
        await house.submit(SaveState("ckpt001", "too-much"), 1, "save-1")
        refused = await outcome(house, "save-1")
        assert refused.error_class == "DiskFull"
        assert refused.error is not None
        assert f"{needed:,}" in refused.error
        assert f"{free:,}" in refused.error
        assert list(house.blobs.children("checkpoints")) == []

        await house.submit(OptimStep(AdamParams()), 2, "step")
        assert (await outcome(house, "step")).error is None
        free += 1
        await house.submit(SaveState("ckpt002", "fits"), 3, "save-2")
        assert (await outcome(house, "save-2")).error is None
        assert list(house.blobs.children("checkpoints")) == ["ckpt002"]
    finally:
        await house.crash()


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (LoraTargets(), 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))),
        (LoraTargets(mlp=False), 2 * (2 * (32 + 32) + 2 * (32 + 16))),
        (LoraTargets(attn=False, mlp=False, unembed=True), 32 + 96),
    ],
)
def test_parameters_per_rank(model: Path, targets: LoraTargets, expected: int) -> None:
    assert parameters_per_rank(model, targets) == expected


def test_the_estimate_is_what_the_engine_trains(model: Path) -> None:
    from selfloop.engine.lora.adapter import AdapterShape
    from selfloop.engine.models.registry import parse_spec

    config = parse_spec(SHAPE | {"model_type": "llama", "max_position_embeddings": 64}, {})
    assert AdapterShape(config, 3).num_parameters == 3 * parameters_per_rank(model, LoraTargets())
