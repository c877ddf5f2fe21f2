"""A snapshot says how its flat vectors are laid out: a model may be described by a family that came later."""

import json
from pathlib import Path

import pytest
import torch

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.engine.models import registry
from selfloop.types.digests import seal
from selfloop.types.errors import OperationFailed
from selfloop.types.operation import AdamParams

DATA = [tiny_models.next_token_datum(tiny_models.random_ids(n, seed=n)) for n in (12, 30)]
ADAM = AdamParams(learning_rate=0.05)


def load(folder: Path) -> Engine:
    return Engine.load(folder, device="cpu", dtype="float32")


def vectors(engine: Engine) -> dict[str, torch.Tensor]:
    run = engine._runs["run"]
    found = {"theta": run.theta_P, "mean": run.moments.mean_P, "grad": run.accumulated.grad_P}
    return {f"{kind} {p.name}": p.view for kind, flat_P in found.items() for p in run.shape.named(flat_P)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("gemma3", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def before(folder: Path) -> Engine:
    """A run with moments and gradients, computed where no family described the model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "SUPPORTED_MODEL_TYPES", frozenset())
        engine = load(folder)
    engine.init_run("run", rank=3, seed=1)
    engine.forward_backward("run", DATA, "cross_entropy", {})
    engine.optim_step("run", ADAM)
    engine.forward_backward("run", DATA, "cross_entropy", {})
    return engine


@pytest.mark.parametrize("says_its_layout", [True, False])
def test_a_run_goes_on_when_a_family_describes_its_model(
    before: Engine, folder: Path, tmp_path: Path, says_its_layout: bool
):
    before.snapshot("run", tmp_path / "snapshot")
    if not says_its_layout:
        change_layout(tmp_path / "snapshot", None)
    engine = load(folder)
    assert engine.info.computed_by != before.info.computed_by
    engine.restore("run", tmp_path / "snapshot")
    expected, found = vectors(before), vectors(engine)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert engine._runs["run"].shape.layout != before._runs["run"].shape.layout


def test_a_layout_that_is_not_known_is_refused(before: Engine, folder: Path, tmp_path: Path):
    before.snapshot("run", tmp_path / "snapshot")
    change_layout(tmp_path / "snapshot", "0123456789abcdef")
    with pytest.raises(OperationFailed, match="laid out as this version does not know"):
        load(folder).restore("run", tmp_path / "snapshot")


def change_layout(directory: Path, layout: str | None) -> None:
    path = directory / "selfloop.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layout": layout}))
    seal(directory)
