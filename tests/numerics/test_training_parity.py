"""Loss, gradients, optimizer trajectory and exported files against transformers + PEFT + torch.optim.AdamW."""

import warnings

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

import tiny_models
from selfloop.types.datum import IGNORED_TARGET
from selfloop.types.operation import AdamParams

SEQUENCES = [tiny_models.random_ids(n, seed=n) for n in (12, 30, 7)]


def disturb(engine, run_id="run"):
    """Give B values: at B = 0 the gradient of A is zero and would prove nothing."""
    run = engine._runs[run_id]
    generator = torch.Generator().manual_seed(9)
    for parameter in run.shape.named(run.theta_P):
        if parameter.kind == "lora_B":
            parameter.view.normal_(0, 0.05, generator=generator)


def reference_loss_sum(model, weights=None):
    total = torch.zeros(())
    for index, ids in enumerate(SEQUENCES):
        logits = model(input_ids=torch.tensor([ids[:-1]])).logits[0]
        nll = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        total = total + (nll if weights is None else nll * torch.tensor(weights[index])).sum()
    return total


def data(weights=None):
    return [
        tiny_models.next_token_datum(ids, None if weights is None else weights[i]) for i, ids in enumerate(SEQUENCES)
    ]


def named_gradients(model):
    return {
        name.removeprefix("base_model.model.model.").removesuffix(".default.weight"): p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("family", ["llama", "llama-tied", "llama-biased", "llama3-rope", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize("budget", [16, 1024])
def test_loss_and_gradients_equal_peft(zoo, family, budget):
    engine = zoo.engine(family, train_token_budget=budget)
    engine.init_run("run", rank=4, seed=3)
    disturb(engine)
    reference = zoo.peft(family, engine, "run")
    weights = [[0.5 + 0.1 * (i % 7) for i in range(len(ids) - 1)] for ids in SEQUENCES]

    result = engine.forward_backward("run", data(weights), "cross_entropy", {})
    expected = reference_loss_sum(reference, weights)
    expected.backward()

    num_tokens = sum(len(ids) - 1 for ids in SEQUENCES)
    assert result.metrics["num_trained_tokens"] == num_tokens
    assert result.loss == pytest.approx(float(expected.detach()) / num_tokens, abs=1e-4)
    run = engine._runs["run"]
    gradients = named_gradients(reference)
    ours = {p.name: p.view for p in run.shape.named(run.accumulated.grad_P)}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # Per trained token, as the optimizer uses it.
        torch.testing.assert_close(ours[name] / num_tokens, gradient / num_tokens, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    "adam",
    [
        AdamParams(learning_rate=5e-3, grad_clip_norm=0.0),
        AdamParams(learning_rate=5e-3, beta2=0.99, eps=1e-8, weight_decay=0.1, grad_clip_norm=0.05),
    ],
)
def test_five_steps_equal_torch_adamw(zoo, adam):
    engine = zoo.engine("llama")
    engine.init_run("run", rank=4, seed=3)
    disturb(engine)
    reference = zoo.peft("llama", engine, "run")
    parameters = [p for p in reference.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=adam.learning_rate,
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        weight_decay=adam.weight_decay,
    )
    num_tokens = sum(len(ids) - 1 for ids in SEQUENCES)
    for step in range(5):
        ours = engine.forward_backward("run", data(), "cross_entropy", {})
        metrics = engine.optim_step("run", adam).metrics
        loss = reference_loss_sum(reference) / num_tokens
        loss.backward()
        max_norm = adam.grad_clip_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        optimizer.zero_grad()
        assert ours.loss == pytest.approx(float(loss.detach()), abs=1e-4)
        assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert metrics["step"] == step + 1
    run = engine._runs["run"]
    for parameter in run.shape.named(run.theta_P):
        expected = reference.get_parameter(f"base_model.model.model.{parameter.name}.default.weight")
        torch.testing.assert_close(parameter.view, expected.detach(), atol=1e-4, rtol=1e-4)


def test_fresh_adapter_has_pefts_distribution(zoo):
    engine = zoo.engine("llama")
    engine.init_run("run", rank=16, seed=0)
    run = engine._runs["run"]
    for parameter in run.shape.named(run.theta_P):
        if parameter.kind == "lora_B":
            assert not parameter.view.any()
        else:
            bound = parameter.view.shape[1] ** -0.5
            assert parameter.view.abs().max() <= bound
            assert parameter.view.std() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2", "qwen3", "mistral"])
def test_exported_adapter_gives_the_same_logits_in_peft(zoo, family, tmp_path):
    engine = zoo.engine(family)
    engine.init_run("run", rank=4, seed=3)
    for _ in range(3):
        engine.forward_backward("run", data(), "cross_entropy", {})
        engine.optim_step("run", AdamParams(learning_rate=1e-2))
    saved = engine.save_sampler_checkpoint("run", tmp_path / "adapter")
    assert saved.size_bytes == sum(p.stat().st_size for p in (tmp_path / "adapter").iterdir())

    with warnings.catch_warnings():
        # PEFT warns of keys that it misses or does not know: those must fail.
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = PeftModel.from_pretrained(zoo.reference(family), tmp_path / "adapter").eval()
    result = engine.forward("run", data(), "cross_entropy", {})
    for ids, logprobs in zip(SEQUENCES, result.logprobs, strict=True):
        with torch.no_grad():
            log_softmax = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        expected = log_softmax[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
        torch.testing.assert_close(torch.tensor(logprobs.values()), expected, atol=1e-4, rtol=1e-4)


def test_adapter_written_by_peft_is_read_with_its_alpha(zoo, tmp_path):
    engine = zoo.engine("llama")
    engine.init_run("run", rank=4, seed=3)
    disturb(engine)
    engine._runs["run"].alpha = 7.0
    reference = zoo.peft("llama", engine, "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference.save_pretrained(tmp_path / "adapter")
    engine.init_run("other", rank=2, seed=0, initial=tmp_path / "adapter")
    assert engine._runs["other"].alpha == 7.0
    expected = engine.forward("run", data(), "cross_entropy", {})
    assert engine.forward("other", data(), "cross_entropy", {}).loss == expected.loss


def test_masked_targets_have_no_part_in_loss_or_gradient(zoo):
    engine = zoo.engine("llama")
    engine.init_run("run", rank=4, seed=3)
    disturb(engine)
    ids = SEQUENCES[0]
    keep = 4
    datum = tiny_models.next_token_datum(ids)
    masked = [*ids[1 : keep + 1], *([IGNORED_TARGET] * (len(ids) - 1 - keep))]
    masked_datum = type(datum)(datum.tokens, {"target_tokens": type(datum.tokens).of(masked, "int64")})
    short = tiny_models.next_token_datum(ids[: keep + 1])
    engine.forward_backward("run", [masked_datum], "cross_entropy", {})
    ours = engine._runs["run"].accumulated
    engine.init_run("other", rank=4, seed=3)
    disturb(engine, "other")
    engine.forward_backward("other", [short], "cross_entropy", {})
    theirs = engine._runs["other"].accumulated
    assert ours.num_tokens == theirs.num_tokens == keep
    torch.testing.assert_close(ours.grad_P, theirs.grad_P, atol=1e-5, rtol=1e-5)
