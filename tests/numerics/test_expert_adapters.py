"""Adapters on experts in files: PEFT's own are imported, ours are opened by PEFT, merged ones by transformers."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import tiny_models
from selfloop.convert.export_adapters import export_merged, export_peft
from selfloop.convert.import_adapters import import_peft
from selfloop.engine.engine import Engine
from selfloop.engine.lora.adapter import AdapterShape
from selfloop.engine.models.registry import read_spec
from selfloop.types.errors import OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.lora_size import parameters_per_rank, save_bytes, with_experts
from selfloop.types.operation import AdamParams

IDS = tiny_models.random_ids(40, seed=5)
DATUM = tiny_models.next_token_datum(IDS)
EXPERTS = LoraTargets(experts=True)
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# What a user may ask PEFT for; by their names gate and up become one matrix of twice the rank.
ASKED = {
    "parameters": {"target_modules": ["q_proj", "o_proj"], "target_parameters": STACKS},
    "parameters alone": {"target_modules": [], "target_parameters": STACKS},
    "down alone": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    "gate and up alone": {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]},
    "names": {"target_modules": ["q_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]},
}


def quiet(_stage: str, _part: float) -> None:
    pass


def peft_folder(asked: dict[str, object], folder: Path, family: str = "qwen3-moe") -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_models.build(family), LoraConfig(r=3, lora_alpha=12, **asked))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.05, generator=generator)
        model.save_pretrained(folder)
    return model


@torch.no_grad()
def by_transformers(model: torch.nn.Module) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([IDS[:-1]])).logits[0]
    return logits.log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


def by_selfloop(engine: Engine) -> torch.Tensor:
    return torch.tensor(engine.forward("run", [DATUM], "cross_entropy", {}).logprobs[0].values())


def trained(zoo, targets: LoraTargets, family: str = "qwen3-moe", steps: int = 2) -> Engine:
    engine = zoo.engine(family)
    engine.init_run("run", rank=4, seed=3, targets=targets)
    train(engine, steps)
    return engine


def train(engine: Engine, steps: int) -> None:
    for _ in range(steps):
        engine.forward_backward("run", [DATUM], "cross_entropy", {})
        engine.optim_step("run", AdamParams(learning_rate=2e-2))


@pytest.mark.parametrize("asked", ASKED)
def test_an_adapter_that_peft_wrote_is_imported(zoo, asked: str, tmp_path: Path):
    reference = peft_folder(ASKED[asked], tmp_path / "peft")
    facts = import_peft(tmp_path / "peft", zoo.folder("qwen3-moe"), tmp_path / "checkpoint", quiet)
    assert facts["lora_rank"] == (6 if asked == "names" else 3)
    engine = zoo.engine("qwen3-moe")
    engine.init_run("run", rank=1, seed=0, initial=tmp_path / "checkpoint")
    expected = by_transformers(reference)
    assert (expected - by_transformers(tiny_models.build("qwen3-moe"))).abs().max() > 0.05
    torch.testing.assert_close(by_selfloop(engine), expected, atol=1e-4, rtol=1e-4)
    before = engine._runs["run"].theta_P.clone()
    train(engine, 1)
    changed = {p.name for p, was in pairs(engine, before) if not torch.equal(p.view, was.view)}
    assert any(".experts." in name for name in changed)


def pairs(engine: Engine, flat_P: torch.Tensor):
    run = engine._runs["run"]
    return zip(run.shape.named(run.theta_P), run.shape.named(flat_P), strict=True)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"target_modules": "all-linear"}, r"mlp\.gate\.lora_A\.weight: routers take no adapters"),
        ({"target_modules": ["q_proj"], "target_parameters": STACKS, "rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
)
def test_what_cannot_be_imported_is_refused_in_words(zoo, asked: dict[str, object], said: str, tmp_path: Path):
    peft_folder(asked, tmp_path / "peft")
    with pytest.raises(OperationFailed, match=said):
        import_peft(tmp_path / "peft", zoo.folder("qwen3-moe"), tmp_path / "checkpoint", quiet)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("target_parameters", ["mlp.experts.other"], "target_modules does not name"),
        ("target_parameters", "experts", "target_parameters must be a list of names"),
        ("alpha_pattern", {r".*\.gate_up_proj": 5}, "alpha_pattern"),
        ("r", 2, r"has shape \[3, 32\], expected \[2, 32\]"),
    ],
)
def test_a_configuration_that_is_not_the_files_is_refused(zoo, key: str, value: object, said: str, tmp_path: Path):
    peft_folder(ASKED["parameters"], tmp_path / "peft")
    config = tmp_path / "peft/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(OperationFailed, match=said):
        import_peft(tmp_path / "peft", zoo.folder("qwen3-moe"), tmp_path / "checkpoint", quiet)


@pytest.mark.parametrize("family", [*tiny_models.MOE_FAMILIES, *tiny_models.ROUTED_FAMILIES])
@pytest.mark.parametrize("targets", [EXPERTS, LoraTargets(attn=False, mlp=False, experts=True), LoraTargets()], ids=str)
def test_an_exported_adapter_is_opened_by_peft_and_merged(zoo, family: str, targets: LoraTargets, tmp_path: Path):
    engine, folder = trained(zoo, targets, family), zoo.folder(family)
    engine.save_sampler_checkpoint("run", tmp_path / "checkpoint")
    ours = by_selfloop(engine)
    assert (ours - by_transformers(tiny_models.build(family))).abs().max() > 0.01
    export_peft(tmp_path / "checkpoint", folder, tmp_path / "peft", "org/base", quiet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = PeftModel.from_pretrained(tiny_models.build(family), tmp_path / "peft")
    torch.testing.assert_close(by_transformers(opened), ours, atol=1e-4, rtol=1e-4)
    facts = export_merged(tmp_path / "checkpoint", folder, tmp_path / "merged", "org/base", quiet)
    assert facts["difference"] <= facts["tolerance"] < facts["effect"]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(by_transformers(merged), ours, atol=1e-4, rtol=1e-4)
    import_peft(tmp_path / "peft", folder, tmp_path / "imported", quiet)
    again = zoo.engine(family)
    again.init_run("run", rank=1, seed=0, initial=tmp_path / "imported")
    assert torch.equal(by_selfloop(again), ours)


def test_a_snapshot_goes_on_as_if_nothing_had_been(zoo, tmp_path: Path):
    whole, first = trained(zoo, EXPERTS, steps=4), trained(zoo, EXPERTS)
    first.snapshot("run", tmp_path / "snapshot")
    second = zoo.engine("qwen3-moe")
    second.restore("run", tmp_path / "snapshot")
    train(second, 2)
    assert torch.equal(whole._runs["run"].theta_P, second._runs["run"].theta_P)
    assert second._runs["run"].shape.targets == EXPERTS


@pytest.mark.parametrize("family", [*tiny_models.MOE_FAMILIES, *tiny_models.ROUTED_FAMILIES])
def test_what_a_run_will_take_is_known_from_its_models_files(zoo, family: str, tmp_path: Path):
    folder = zoo.folder(family)
    spec = read_spec(folder)
    assert with_experts(folder, LoraTargets(unembed=True)) == LoraTargets(unembed=True, experts=True)
    assert with_experts(folder, LoraTargets(mlp=False)) == LoraTargets(mlp=False)
    assert with_experts(zoo.folder("llama"), LoraTargets()) == LoraTargets()
    for targets in (EXPERTS, LoraTargets(), LoraTargets(mlp=False), LoraTargets(unembed=True, experts=True)):
        assert AdapterShape(spec, 3, targets).num_parameters == 3 * parameters_per_rank(folder, targets)
    engine = trained(zoo, EXPERTS, family)
    saved = engine.save_trainer_checkpoint("run", tmp_path / "saved").size_bytes
    assert saved <= save_bytes(folder, 4, EXPERTS, with_optimizer=True) < 2 * saved + 2**20


def test_runs_from_before_experts_took_adapters_keep_their_layout(zoo):
    """What their rows and files say is read without ``experts``."""
    spec = read_spec(zoo.folder("qwen3-moe"))
    for stored in (None, "attn,mlp", "attn,mlp,unembed"):
        targets = LoraTargets.parse(stored)
        shape = AdapterShape(spec, 4, targets)
        names = {
            p.name.rpartition(".lora_")[0].partition(".")[2] for p in shape.named(torch.zeros(shape.num_parameters))
        }
        dense = {f"1.mlp.{name}_proj" for name in ("gate", "up", "down")}
        assert {name for name in names if "mlp" in name} == dense
        assert stored is None or str(targets) == stored
