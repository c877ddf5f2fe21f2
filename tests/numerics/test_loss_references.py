"""Every loss on random data against the formulas of ``docs/losses.md``, in float64 on the logits of PEFT's model.

Value, gradient of every adapter parameter, metrics and counts; with masks, inputs that are no numbers where masked, one
call or several, and any cut into micro-batches.
"""

import math
import random
from functools import cache
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training_parity import disturb

import tiny_models
from selfloop.types.datum import IGNORED_TARGET, Datum, Tensor
from selfloop.types.losses import LOSSES
from selfloop.types.operation import AdamParams
from selfloop.types.settings import EngineLimits

Config = dict[str, float]


class Row(NamedTuple):
    """One datum: ids, targets (N,) or (N, K), and the other inputs by name in the same shape."""

    ids: list[int]
    targets: torch.Tensor
    inputs: dict[str, torch.Tensor]

    @property
    def active(self) -> torch.Tensor:
        return self.targets != IGNORED_TARGET


# -- the formulas, one token after another ----------------------------------------------------------------------


def cross_entropy(lp, row, config):
    weights = row.inputs.get("weights", torch.ones_like(lp))
    return [-w * x for x, w, active in flat(lp, weights, row.active) if active]


def policy(formula):
    def loss(lp, row, config):
        q, a = row.inputs["logprobs"], row.inputs["advantages"]
        return [formula(x, old, adv, config) for x, old, adv, active in flat(lp, q, a, row.active) if active]

    return loss


def importance_sampling(lp, q, a, config):
    return -torch.exp(lp - q) * a


def clip(ratio, config):
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    return torch.full_like(ratio, low) if ratio < low else torch.full_like(ratio, high) if ratio > high else ratio


def ppo(lp, q, a, config):
    ratio = torch.exp(lp - q)
    return -torch.minimum(ratio * a, clip(ratio, config) * a)


def cispo(lp, q, a, config):
    return -float(clip(torch.exp(lp.detach() - q), config)) * a * lp


def dro(lp, q, a, config):
    return -(a * lp - config["beta"] / 2 * (lp - q) ** 2)


def dppo(lp, q, a, config):
    moved = math.exp(float(lp.detach())) - math.exp(float(q))
    far = moved > config["dppo_mask_high"] if a > 0 else moved < -config["dppo_mask_low"]
    gain = torch.zeros_like(lp) if far else config["adv_tau"] * a * torch.exp(lp - q)
    return config["kl_tau"] * (lp - q) ** 2 - gain


def sequence_drift(lp, row, divide):
    """The sum or the mean of lp - q over the tokens that make up the sequence's ratio."""
    mask = row.inputs.get("sequence_ratio_mask", row.inputs["advantages"])
    parts = [float(x - q) for x, q, m, on in flat(lp.detach(), row.inputs["logprobs"], mask, row.active) if on and m]
    return sum(parts) / (len(parts) if divide and parts else 1)


def gspo(lp, row, config):
    ratio = math.exp(sequence_drift(lp, row, divide=True))
    bounds = {
        "clip_low_threshold": 1 - config["clip_low_threshold"],
        "clip_high_threshold": 1 + config["clip_high_threshold"],
    }
    losses = []
    for x, a, active in flat(lp, row.inputs["advantages"], row.active):
        if active:
            of_token = ratio * torch.exp(x - x.detach())
            losses.append(-torch.minimum(of_token * a, clip(of_token, bounds) * a))
    return losses


def stable_reinforce(lp, row, config):
    ratio = min(math.exp(sequence_drift(lp, row, divide=False)), config["ratio_cap"])
    parts = flat(lp, row.inputs["logprobs"], row.inputs["advantages"], row.active)
    return [
        -ratio * x * a + (config["kl_coeff"] / 2 * (x - q) ** 2 if a != 0 else 0) for x, q, a, active in parts if active
    ]


def dpo_delta(chosen, rejected, config):
    def drift(lp, row):
        weights = row.inputs.get("weights", torch.ones_like(lp))
        parts = flat(lp, row.inputs["ref_logprobs"], weights, row.active)
        return sum((w * (x - ref) for x, ref, w, active in parts if active), torch.zeros((), dtype=torch.float64))

    return config["beta"] * (drift(*chosen) - drift(*rejected))


def dpo(chosen, rejected, config):
    delta, smoothing = dpo_delta(chosen, rejected, config), config["label_smoothing"]
    return (1 - smoothing) * torch.log1p(torch.exp(-delta)) + smoothing * torch.log1p(torch.exp(delta))


TOKEN_LOSSES = {
    "cross_entropy": cross_entropy,
    "importance_sampling": policy(importance_sampling),
    "ppo": policy(ppo),
    "cispo": policy(cispo),
    "dro": policy(dro),
    "dppo": policy(dppo),
    "gspo": gspo,
    "stable_reinforce": stable_reinforce,
}


def flat(*tensors):
    return zip(*(tensor.flatten() for tensor in tensors), strict=True)


def is_trained(row):
    """Whether any token of the row counts."""
    return num_trained(row) > 0


def num_trained(row):
    weights = row.inputs.get("weights", torch.ones(row.targets.shape))
    counted = row.active & (weights != 0)
    return int((counted if counted.dim() == 1 else counted.any(1)).sum())


class Expected(NamedTuple):
    loss_sum: torch.Tensor
    num_units: int
    num_tokens: int


def reference(model, loss_fn, rows, config) -> Expected:
    logprobs = []
    for row in rows:
        lp_NV = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        targets = row.targets.clamp(min=0)
        columns = targets[:, None] if targets.dim() == 1 else targets
        logprobs.append(lp_NV.gather(1, columns).reshape(targets.shape))
    num_tokens = sum(map(num_trained, rows))
    if loss_fn == "dpo":
        paired = list(zip(logprobs, rows, strict=True))
        pairs = [p for p in zip(paired[::2], paired[1::2], strict=True) if is_trained(p[0][1]) or is_trained(p[1][1])]
        losses = [dpo(*pair, config) for pair in pairs]
        num_units = len(pairs)
    else:
        losses = [x for lp, row in zip(logprobs, rows, strict=True) for x in TOKEN_LOSSES[loss_fn](lp, row, config)]
        num_units = num_tokens
    # A sum over nothing still has a gradient, of zero.
    zero = sum((lp.sum() * 0 for lp in logprobs), torch.zeros((), dtype=torch.float64))
    return Expected(sum(losses, zero), num_units, num_tokens)


# -- random data ------------------------------------------------------------------------------------------------


def random_row(rng: random.Random, loss_fn: str, num_targets: int) -> Row:
    num = rng.randint(1, 12)
    shape = (num,) if num_targets == 1 else (num, num_targets)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator).double()

    ids = tiny_models.random_ids(num, rng.randrange(2**31))
    targets = torch.randint(3, tiny_models.VOCAB_SIZE, shape, generator=generator)
    targets[uniform(0, 1) < rng.choice([0.0, 0.3, 1.0])] = IGNORED_TARGET
    inputs: dict[str, torch.Tensor] = {}
    if loss_fn in ("cross_entropy", "dpo") and rng.random() < 0.7:
        inputs["weights"] = uniform(-0.5, 1.5) * (uniform(0, 1) > 0.2)
    if loss_fn == "dpo":
        inputs["ref_logprobs"] = uniform(-6, -3)
    elif loss_fn != "cross_entropy":
        # Near the tiny model's own logprobs, so that ratios fall on both sides of the thresholds.
        inputs["logprobs"] = uniform(-6, -3.5)
        inputs["advantages"] = uniform(-1, 1) * (uniform(0, 1) > 0.2)
    if loss_fn == "gspo" and rng.random() < 0.5:
        inputs["sequence_ratio_mask"] = (uniform(0, 1) > 0.3).double()
    inputs = {name: values.float().double() for name, values in inputs.items()}
    for name in inputs.keys() - {"weights"}:
        inputs[name][targets == IGNORED_TARGET] = rng.choice([0.0, math.nan])
    return Row(ids, targets, inputs)


def to_datum(row: Row) -> Datum:
    shape = tuple(row.targets.shape)
    inputs = {name: Tensor.of(v.flatten().tolist(), "float32", shape) for name, v in row.inputs.items()}
    inputs["target_tokens"] = Tensor.of(row.targets.flatten().tolist(), "int64", shape)
    return Datum(Tensor.of(row.ids, "int64"), inputs)


CONFIGS: dict[str, st.SearchStrategy[Config]] = {
    "cross_entropy": st.just({}),
    "importance_sampling": st.just({}),
    "ppo": st.sampled_from([{}, {"clip_low_threshold": 0.5, "clip_high_threshold": 1.05}]),
    "cispo": st.sampled_from([{}, {"clip_low_threshold": 0.3, "clip_high_threshold": 3.0}]),
    "dro": st.sampled_from([{}, {"beta": 0.7}]),
    "dppo": st.sampled_from([{}, {"dppo_mask_high": 0.002, "dppo_mask_low": 0.004, "adv_tau": 0.5, "kl_tau": 0.3}]),
    "gspo": st.sampled_from([{}, {"clip_low_threshold": 0.5, "clip_high_threshold": 1.0}]),
    "stable_reinforce": st.sampled_from([{}, {"ratio_cap": 0.7, "kl_coeff": 0.3}]),
    "dpo": st.sampled_from([{}, {"beta": 0.7, "label_smoothing": 0.2}]),
}


@cache
def engine_and_model(zoo, budget: int):
    engine = zoo.engine("llama", limits=EngineLimits(train_token_budget=budget))
    engine.init_run("run", rank=4, seed=3)
    disturb(engine)
    return engine, zoo.peft("llama", engine, "run").double()


def gradients(model, total: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(total, list(named.values()))
    strip = "base_model.model.model."
    return {
        name.removeprefix(strip).removesuffix(".default.weight"): grad for name, grad in zip(named, found, strict=True)
    }


def test_every_loss_has_its_formula_here():
    assert {*TOKEN_LOSSES, "dpo"} == CONFIGS.keys() == LOSSES.keys()


@pytest.mark.parametrize("loss_fn", LOSSES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data())
def test_value_and_gradient_are_those_of_the_formula(zoo, loss_fn, drawn):
    spec = LOSSES[loss_fn]
    config = drawn.draw(CONFIGS[loss_fn])
    rng = random.Random(drawn.draw(st.integers(0, 2**31)))
    num_targets = drawn.draw(st.sampled_from([1, 3])) if spec.many_targets else 1
    num_units = drawn.draw(st.integers(1, 4))
    split = drawn.draw(st.integers(1, num_units)) * spec.rows
    engine, model = engine_and_model(zoo, drawn.draw(st.sampled_from([8, 1024])))
    rows = [random_row(rng, loss_fn, num_targets) for _ in range(num_units * spec.rows)]

    full = {**spec.config, **config}
    expected = reference(model, loss_fn, rows, full)
    run = engine._runs["run"]
    run.accumulated = None
    results = [
        (engine.forward_backward("run", [to_datum(row) for row in part], loss_fn, config), part)
        for part in (rows[:split], rows[split:])
        if part
    ]
    # Each call answers the mean over what it trained; together they are the whole.
    for result, part in results:
        with torch.no_grad():
            alone = reference(model, loss_fn, part, full)
        mean = float(alone.loss_sum) / alone.num_units if alone.num_units else 0.0
        assert result.loss == pytest.approx(mean, rel=1e-4, abs=1e-4)
        assert result.metrics["num_trained_tokens"] == alone.num_tokens
        assert engine.forward("run", [to_datum(row) for row in part], loss_fn, config).loss == result.loss
        for row, logprobs in zip(part, result.logprobs, strict=True):
            masked = [math.isnan(value) for value in logprobs.values()]
            assert masked == (~row.active).flatten().tolist()
    accumulated = run.accumulated
    ours = {p.name: p.view for p in run.shape.named(accumulated.grad_P)}
    theirs = gradients(model, expected.loss_sum)
    assert ours.keys() == theirs.keys()
    scale = max(1.0, *(float(gradient.abs().max()) for gradient in theirs.values()))
    for name, gradient in theirs.items():
        assert (ours[name].double() - gradient).abs().max() < 1e-4 * scale, name
    assert accumulated.num_tokens == expected.num_tokens
    divisor = accumulated.num_tokens if accumulated.num_pairs is None else accumulated.num_pairs
    assert divisor == expected.num_units
    # The step takes the mean; at a rate of zero it changes nothing.
    before = run.theta_P.clone()
    norm = engine.optim_step("run", AdamParams(learning_rate=0.0)).metrics["grad_norm"]
    if expected.num_tokens:
        total = torch.cat([gradient.flatten() for gradient in theirs.values()]).norm()
        assert norm == pytest.approx(float(total) / expected.num_units, rel=1e-3, abs=1e-4)
    assert torch.equal(run.theta_P, before)
