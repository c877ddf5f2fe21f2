"""Operations of many runs in one pass: each gets what it gets alone, and what PEFT gives."""

import math

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.types.datum import IGNORED_TARGET, Datum, Tensor
from selfloop.types.errors import BadRequest, NotFound, OperationFailed
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import AdamParams, Forward, ForwardBackward
from selfloop.types.settings import EngineLimits

ADAM = AdamParams(learning_rate=1e-2)
TARGETS = [LoraTargets(), LoraTargets(mlp=False), LoraTargets(attn=False), LoraTargets(unembed=True)]


def perturb(engine, run_id):
    run = engine._runs[run_id]
    run.theta_P.add_(torch.randn(run.theta_P.shape, generator=torch.Generator().manual_seed(len(run_id))), alpha=0.05)


def with_inputs(ids, **inputs):
    datum = tiny_models.next_token_datum(ids)
    num = len(ids) - 1
    given = {name: Tensor.of([value(i) for i in range(num)], "float32") for name, value in inputs.items()}
    return Datum(datum.tokens, {**datum.loss_inputs, **given})


def supervised(seed, num=3):
    return [tiny_models.next_token_datum(tiny_models.random_ids(4 + 5 * i + seed % 3, seed + i)) for i in range(num)]


def off_policy(seed, num=2):
    return [
        with_inputs(
            tiny_models.random_ids(6 + 3 * i, seed + i),
            logprobs=lambda t: -3.0 - 0.1 * (t % 3),
            advantages=lambda t: 1.0 - 0.7 * (t % 4),
        )
        for i in range(num)
    ]


def preferred(seed):
    return [with_inputs(tiny_models.random_ids(7 + i, seed + i), ref_logprobs=lambda t: -4.0) for i in range(4)]


def many_targets(seed):
    ids = tiny_models.random_ids(9, seed)
    targets = [t for i, token in enumerate(ids) for t in (token, ids[i - 1] if i % 3 else IGNORED_TARGET)]
    return [Datum(Tensor.of(ids, "int64"), {"target_tokens": Tensor.of(targets, "int64", (9, 2)),
                                            "weights": Tensor.of([0.5] * 18, "float32", (9, 2))})]  # fmt: skip


MENU = [
    lambda seed: ForwardBackward(supervised(seed), "cross_entropy", {}),
    lambda seed: ForwardBackward(supervised(seed), "cross_entropy", {}, 2, True),
    lambda seed: ForwardBackward(many_targets(seed), "cross_entropy", {}),
    lambda seed: ForwardBackward(off_policy(seed), "ppo", {"clip_low_threshold": 0.8}),
    lambda seed: ForwardBackward(off_policy(seed), "importance_sampling", {}),
    lambda seed: ForwardBackward(preferred(seed), "dpo", {"beta": 0.3}),
    lambda seed: Forward(supervised(seed), "cross_entropy", {}, 3),
]


def start(engine, kinds):
    """One run a kind, of mixed ranks and targets; their names."""
    names = [f"run{place}" for place in range(len(kinds))]
    for place, name in enumerate(names):
        engine.init_run(name, rank=(1, 4, 7)[place % 3], seed=place, targets=TARGETS[place % len(TARGETS)])
        perturb(engine, name)
    return names


def close(one, other, atol=1e-5):
    assert one.loss == pytest.approx(other.loss, abs=atol)
    assert one.metrics == pytest.approx(other.metrics, abs=atol)
    assert one.topk_tokens == other.topk_tokens
    for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(
            torch.tensor(mine.values()), torch.tensor(theirs.values()), atol=atol, rtol=0, equal_nan=True
        )


def gradient(engine, name):
    pending = engine._runs[name].accumulated
    return None if pending is None else pending.grad_P


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_every_loss_beside_every_other_equals_it_alone(zoo, family):
    """Two rounds with a step between them: different ranks, targets, losses, settings and lengths in one pass."""
    together, alone = (
        zoo.engine(family, limits=EngineLimits(train_token_budget=256)),
        zoo.engine(family, limits=EngineLimits(train_token_budget=256)),
    )
    kinds = list(range(len(MENU)))
    names = start(together, kinds)
    start(alone, kinds)
    for turn in range(2):
        asked = [(name, MENU[kind](10 * turn + kind)) for name, kind in zip(names, kinds, strict=True)]
        mixed = together.compute(asked)
        single = [alone.compute([one])[0] for one in asked]
        for name, one, other in zip(names, mixed, single, strict=True):
            close(one, other)
            if gradient(alone, name) is not None:
                torch.testing.assert_close(gradient(together, name), gradient(alone, name), atol=1e-4, rtol=1e-4)
        for engine in (together, alone):
            for place, name in enumerate(names):
                engine.optim_step(name, AdamParams(learning_rate=1e-3 * (place + 1), weight_decay=0.1 * place))


def test_one_of_many_equals_peft(zoo):
    engine = zoo.engine("llama")
    engine.init_run("run", rank=4, seed=3)
    perturb(engine, "run")
    reference = zoo.peft("llama", engine, "run")
    for place in range(3):
        engine.init_run(f"mate{place}", rank=8, seed=place)
        perturb(engine, f"mate{place}")
    data = supervised(0)
    mates = [(f"mate{place}", MENU[place](5)) for place in range(3)]
    result = engine.compute([*mates, ("run", ForwardBackward(data, "cross_entropy", {}))])[-1]
    total = torch.zeros(())
    for datum in data:
        logits = reference(input_ids=torch.tensor([datum.tokens.values()])).logits[0]
        targets = torch.tensor(datum.loss_inputs["target_tokens"].values())
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    total.backward()
    num = sum(datum.tokens.num_elements for datum in data)
    assert result.loss == pytest.approx(float(total.detach()) / num, abs=1e-4)
    for parameter in engine._runs["run"].shape.named(gradient(engine, "run")):
        expected = reference.get_parameter(f"base_model.model.model.{parameter.name}.default.weight").grad
        torch.testing.assert_close(parameter.view / num, expected / num, atol=1e-4, rtol=1e-4)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, len(MENU) - 1), min_size=1, max_size=8), st.integers(4, 80), st.integers(0, 99))
def test_any_grouping_gives_the_same(zoo, kinds, budget, seed):
    """Whatever comes together, and however small a pass is."""
    together, alone = zoo.engine("llama-tied", limits=EngineLimits(train_token_budget=budget)), zoo.engine("llama-tied")
    names = start(together, kinds)
    start(alone, kinds)
    asked = [(name, MENU[kind](seed + place)) for place, (name, kind) in enumerate(zip(names, kinds, strict=True))]
    for name, one, request in zip(names, together.compute(asked), asked, strict=True):
        close(one, alone.compute([request])[0])
        if gradient(alone, name) is not None:
            torch.testing.assert_close(gradient(together, name), gradient(alone, name), atol=1e-4, rtol=1e-4)


def test_what_fails_fails_alone(zoo):
    engine = zoo.engine("llama-tied", limits=EngineLimits(train_token_budget=512))
    alone = zoo.engine("llama-tied", limits=EngineLimits(train_token_budget=512))
    for one in (engine, alone):
        start(one, [0, 0])
    for name in ("nan", "infinite", "huge", "refused"):
        engine.init_run(name, rank=4, seed=1)
    engine._runs["nan"].theta_P.fill_(math.nan)
    engine._runs["infinite"].theta_P.fill_(math.inf)
    engine._runs["huge"].theta_P.fill_(1e30)
    good = ForwardBackward(supervised(3), "cross_entropy", {})
    bad = ForwardBackward([tiny_models.next_token_datum([3, 4, 5], [1.0, math.nan])], "cross_entropy", {})
    names = ["nan", "run0", "infinite", "nobody", "huge", "run1", "refused", "run0"]
    outcomes = dict(enumerate(engine.compute([*((name, good) for name in names[:-2]), ("refused", bad)])))
    assert [type(outcomes[place]) for place in (0, 2, 3, 4, 6)] == [
        OperationFailed, OperationFailed, NotFound, OperationFailed, OperationFailed
    ]  # fmt: skip
    for place, name in ((1, "run0"), (5, "run1")):
        close(outcomes[place], alone.compute([(name, good)])[0])
        torch.testing.assert_close(gradient(engine, name), gradient(alone, name), atol=1e-4, rtol=1e-4)
    for name in ("nan", "infinite", "huge", "refused"):
        assert gradient(engine, name) is None
    (wrong,) = engine.compute([("run0", Forward(supervised(3), "ppo", {}))])
    assert isinstance(wrong, BadRequest)


def test_an_absurd_learning_rate_stays_at_home(zoo):
    """A run that is blown to pieces beside a healthy one: the healthy one trains and samples as alone."""
    engine, alone = zoo.engine("llama-tied"), zoo.engine("llama-tied")
    for one in (engine, alone):
        one.init_run("good", rank=4, seed=1)
    engine.init_run("bad", rank=4, seed=2)
    for turn in range(4):
        operation = ForwardBackward(supervised(turn), "cross_entropy", {})
        engine.compute([("bad", operation), ("good", operation)])
        alone.compute([("good", operation)])
        engine.optim_step("bad", AdamParams(learning_rate=1e30, grad_clip_norm=0.0))
        for one in (engine, alone):
            one.optim_step("good", ADAM)
    assert engine._runs["good"].theta_P.isfinite().all()
    torch.testing.assert_close(engine._runs["good"].theta_P, alone._runs["good"].theta_P, atol=1e-4, rtol=1e-4)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, len(MENU) - 1), min_size=2, max_size=6), st.integers(20, 200), st.integers(0, 99))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_bits_do_not_depend_on_mates(zoo, dtype, kinds, budget, seed):
    """Two steps of each run with mates, and again without: the same weights and results, bit for bit."""

    def train(apart):
        engine = Engine.load(
            zoo.folder("llama"),
            device="cpu",
            dtype=dtype,
            limits=EngineLimits(train_token_budget=budget),
            deterministic=True,
        )
        names, results = start(engine, kinds), []
        for turn in range(2):
            asked = [(name, MENU[kind](seed + turn + kind)) for name, kind in zip(names, kinds, strict=True)]
            results += [engine.compute([one])[0] for one in asked] if apart else engine.compute(asked)
            for name in names:
                engine.optim_step(name, ADAM)
        return results, [engine._runs[name].theta_P for name in names]

    mixed, mixed_weights = train(apart=False)
    alone, alone_weights = train(apart=True)
    # As bytes: NaN stands where a target is masked.
    assert [msgspec.msgpack.encode(result) for result in mixed] == [msgspec.msgpack.encode(result) for result in alone]
    assert all(torch.equal(one, other) for one, other in zip(mixed_weights, alone_weights, strict=True))
