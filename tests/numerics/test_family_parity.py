"""Families that people train, each by the backend that is chosen for it, against transformers, PEFT and itself."""

import json
from pathlib import Path

import pytest

import family_models
import family_parity
from family_parity import Served
from selfloop.types.errors import OperationFailed

# Of logits and gradients, as a part of their largest: what float32 makes of a few layers.
BOUND = 2e-5

REFUSED = {
    "deepseek_v4": r"gate\.tid2eid is I64",
    "kimi_linear": "is stored under a name that no module of transformers has",
    "nemotron_h": "its names are not those of a text model",
}
"""Families that are not served, with the words that say so when they are loaded."""

SERVED = [name for name in family_models.OVERRIDES if name not in REFUSED]


@pytest.fixture(scope="module", params=SERVED)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return family_parity.serve(request.param, tmp_path_factory.mktemp(request.param) / "model")


def test_logits_are_those_of_transformers(served: Served):
    """Of several sequences in one call here, and of each alone there."""
    assert family_parity.logits_difference(served) <= BOUND


def test_loss_and_gradients_are_those_of_peft(served: Served):
    loss, gradients = family_parity.gradients_difference(served)
    assert loss <= BOUND
    assert gradients <= BOUND


def test_cached_is_whole(served: Served):
    assert family_parity.cached_difference(served) <= BOUND


def test_two_runs_together_are_each_alone(served: Served):
    assert family_parity.together_difference(served) <= BOUND


def test_greedy_tokens_are_those_of_generate(served: Served):
    for found, expected in family_parity.sampled(served):
        assert found == expected


@pytest.mark.parametrize("model_type", list(REFUSED))
def test_a_family_that_is_not_served_is_refused_in_words(model_type: str, tmp_path: Path):
    with pytest.raises(OperationFailed, match=REFUSED[model_type]):
        family_parity.load(model_type, tmp_path / "model")


def test_a_type_that_transformers_has_not_is_refused_in_words(tmp_path: Path):
    """Kimi K2's folders hold a DeepSeek-V3 by another name, with code of their own."""
    family_parity.save("deepseek_v3", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_type": "kimi_k2", "auto_map": {"AutoConfig": "configuration.Kimi"}}))
    with pytest.raises(OperationFailed, match="'kimi_k2' needs code of its own"):
        family_parity.load("kimi_k2", tmp_path / "model")


def test_attention_that_is_scaled_from_a_far_position_on_is_found_out_by_short_sequences(tmp_path: Path):
    """Llama 4 counts places in the batch where others read position ids: its sequences never share a row."""
    folder = tmp_path / "model"
    family_parity.save("llama4_text", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "floor_scale": 8192}))
    model = family_parity.load("llama4_text", folder)._model
    assert (model.findings.layout, model.findings.pads) == ("padded", False)
    assert {module.floor_scale for module in model.passes.modules() if hasattr(module, "floor_scale")} == {8192}


def test_the_documentation_shows_how_a_family_is_served(served: Served):
    """``PYTHONPATH=tests python tests/family_parity.py`` and ``make docs``, where it does not."""
    measured = json.loads(family_parity.MEASURED.read_text(encoding="utf-8"))
    assert measured[served.name]["computed_by"] == family_parity.computed_by(served)


def test_the_documentation_shows_every_family():
    measured = json.loads(family_parity.MEASURED.read_text(encoding="utf-8"))
    assert list(measured) == list(family_models.OVERRIDES)
    assert {name for name, found in measured.items() if "refused" in found} == set(REFUSED)
