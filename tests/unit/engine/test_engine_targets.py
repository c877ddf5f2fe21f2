"""Which parts of a model an adapter changes: layers, output layer, both; in training, sampling and files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny_models
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.logprob import HeadAdapter, score
from selfloop.engine.engine import Engine
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import AdamParams
from selfloop.types.sampling import AdapterRef, SampleRequest, SamplingParams

IDS = tiny_models.random_ids(20, seed=3)
DATUM = tiny_models.next_token_datum(IDS)
ALL = LoraTargets(unembed=True)
CHOICES = [LoraTargets(attn=True, mlp=False), LoraTargets(attn=False, mlp=True), ALL, LoraTargets(False, False, True)]


def trained(engine: Engine, targets: LoraTargets, run_id: str = "r") -> Engine:
    engine.init_run(run_id, rank=4, seed=1, targets=targets)
    for _ in range(3):
        engine.forward_backward(run_id, [DATUM], "cross_entropy", {}, summed=True)
        engine.optim_step(run_id, AdamParams(learning_rate=1e-2))
    return engine


def logprobs(engine: Engine, run_id: str = "r") -> torch.Tensor:
    (found,) = engine.forward(run_id, [DATUM], "cross_entropy", {}, summed=True).logprobs
    return torch.tensor(found.values())


@pytest.mark.parametrize("targets", CHOICES, ids=str)
def test_only_the_targets_are_trained(engine: Engine, targets: LoraTargets, tmp_path: Path):
    trained(engine, targets)
    engine.save_trainer_checkpoint("r", tmp_path / "saved")
    names = {p.name for p in engine._run("r").shape.named(engine._run("r").theta_P)}
    assert any("self_attn" in name for name in names) == targets.attn
    assert any("mlp" in name for name in names) == targets.mlp
    assert any("lm_head" in name for name in names) == targets.unembed
    engine.init_run("again", rank=1, seed=0, initial=tmp_path / "saved", with_optimizer=True)
    assert engine._run("again").shape.targets == targets
    assert engine._run("again").step == 3
    assert torch.equal(logprobs(engine), logprobs(engine, "again"))


@pytest.mark.parametrize("targets", CHOICES, ids=str)
def test_sampler_and_trainer_agree(engine: Engine, targets: LoraTargets):
    trained(engine, targets)
    engine.publish("r", "c")
    params = SamplingParams(max_tokens=1)
    engine.submit_sample(_request("base", params, None))
    engine.submit_sample(_request("tuned", params, "c"))
    results = {}
    while engine.num_sampling:
        results |= {result.request_id: result for result in engine.sample_step()}
    tuned, base = (torch.tensor([t[0].logprob for t in results[n].prompt_logprobs[1:]]) for n in ("tuned", "base"))
    assert (tuned - logprobs(engine)).abs().max() < 1e-4
    assert (tuned - base).abs().max() > 0.05


def _request(name: str, params: SamplingParams, checkpoint: str | None) -> SampleRequest:
    adapter = None if checkpoint is None else AdapterRef(checkpoint)
    return SampleRequest(name, IDS, 1, params, adapter, prompt_logprobs=0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_peft_reads_an_adapted_output_layer(engine: Engine, model_dir: Path, tmp_path: Path):
    trained(engine, ALL)
    engine.save_sampler_checkpoint("r", tmp_path / "saved")
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    base.config.tie_word_embeddings = False
    model = PeftModel.from_pretrained(base, tmp_path / "saved")
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([IDS])).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    assert (logprobs(engine) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("num_targets", [1, 3])
def test_gradients_through_an_adapted_head(num_targets: int):
    torch.manual_seed(0)
    h, head, a, b = (torch.randn(s) for s in ((7, 5), (11, 5), (2, 5), (11, 2)))
    targets = torch.randint(11, (7, num_targets)).squeeze(1)
    weights = torch.randn(targets.shape)
    leaves = [t.clone().requires_grad_() for t in (h, a, b)]
    logprob = score(leaves[0], FrozenLinear(head), targets, 2, HeadAdapter(leaves[1], leaves[2], 0.7)).logprobs
    grads = torch.autograd.grad((logprob * weights).sum(), leaves)
    plain = [t.clone().requires_grad_() for t in (h, a, b)]
    logits = plain[0] @ head.t() + 0.7 * (plain[0] @ plain[1].t()) @ plain[2].t()
    expected = logits.log_softmax(-1).gather(1, targets.view(7, -1)).view(targets.shape)
    torch.testing.assert_close(logprob, expected)
    for found, right in zip(grads, torch.autograd.grad((expected * weights).sum(), plain), strict=True):
        torch.testing.assert_close(found, right)


def test_unnormalised_gradients_add_up(load: Callable[..., Engine]):
    """Two calls with a datum each are one call with both, and nothing is divided."""
    once, twice = load(), load()
    for engine in (once, twice):
        engine.init_run("r", rank=4, seed=1)
    result = once.forward_backward("r", [DATUM, DATUM], "cross_entropy", {}, summed=True)
    for _ in range(2):
        twice.forward_backward("r", [DATUM], "cross_entropy", {}, summed=True)
    assert result.loss == pytest.approx(-2 * float(logprobs(twice).sum()), rel=1e-5)
    norms = [engine.optim_step("r", AdamParams()).metrics["grad_norm"] for engine in (once, twice)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
