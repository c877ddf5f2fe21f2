"""Forwards that are kept for their backward: the same bits as computed anew, and only as long as they serve."""

import gc
import weakref

import pytest
import torch

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.types.datum import IGNORED_TARGET, Datum, Tensor
from selfloop.types.lora import LoraTargets
from selfloop.types.operation import AdamParams, Forward, ForwardBackward
from selfloop.types.settings import EngineLimits

ADAM = AdamParams(learning_rate=1e-2)
MANY = 10**9


@pytest.fixture(scope="module")
def qwen3_dir(tmp_path_factory):
    return tiny_models.save("qwen3", tmp_path_factory.mktemp("qwen3"))


def load(folder, forward_cache_bytes=MANY, *, dtype="float32", budget=40, deterministic=False):
    return Engine.load(
        folder,
        device="cpu",
        dtype=dtype,
        limits=EngineLimits(train_token_budget=budget, forward_cache_bytes=forward_cache_bytes),
        deterministic=deterministic,
    )


def add_run(engine, name, *, rank=4, targets=LoraTargets()):
    engine.init_run(name, rank=rank, seed=len(name), targets=targets)
    theta_P = engine._runs[name].theta_P
    theta_P.add_(torch.randn(theta_P.shape, generator=torch.Generator().manual_seed(rank)), alpha=0.05)


def datum(seed, num, weight, columns=1):
    """With a masked position, and ``weight(position)`` as weights."""
    ids = tiny_models.random_ids(num + columns, seed)
    targets = [ids[i + 1 + k] if i != 2 else IGNORED_TARGET for i in range(num) for k in range(columns)]
    shape = (num,) if columns == 1 else (num, columns)
    return Datum(
        Tensor.of(ids[:num], "int64"),
        {
            "target_tokens": Tensor.of(targets, "int64", shape),
            "weights": Tensor.of([weight(i) for i in range(num * columns)], "float32", shape),
        },
    )


def data(weight, seed=0, num=5, columns=1):
    return [datum(seed + i, 9 + 4 * i, weight, columns) for i in range(num)]


def zero(_):
    return 0.0


def slope(position):
    return 0.3 - 0.2 * (position % 4)


def bits(tensors):
    return [(tensor.shape, tensor.data) for tensor in tensors]


def both(engine, name, **kinds):
    """The two calls of a custom loss; their logprobs and the gradient."""
    first = engine.forward(name, data(zero, **kinds), "cross_entropy", {}, summed=True)
    second = engine.forward_backward(name, data(slope, **kinds), "cross_entropy", {}, summed=True)
    assert second.loss != 0
    return bits(first.logprobs), bits(second.logprobs), engine._runs[name].accumulated.grad_P


def same(one, other):
    assert one[:2] == other[:2]
    assert torch.equal(one[2], other[2])
    assert one[2].abs().sum() > 0


def count_passes(engine, monkeypatch):
    passes = []
    forward = engine._model.forward

    def counted(batch, *rest, **more):
        passes.append(batch.tokens_T.shape[0])
        return forward(batch, *rest, **more)

    monkeypatch.setattr(engine._model, "forward", counted)
    return passes


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("targets", [LoraTargets(), LoraTargets(unembed=True)], ids=["layers", "with-head"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_and_computed_anew_are_the_same_bits(qwen3_dir, monkeypatch, dtype, targets, columns):
    keeping, anew = load(qwen3_dir, dtype=dtype), load(qwen3_dir, 0, dtype=dtype)
    outcomes = []
    for engine, num_passes in ((keeping, 3), (anew, 6)):
        passes = count_passes(engine, monkeypatch)
        add_run(engine, "run", targets=targets)
        outcomes.append(both(engine, "run", columns=columns))
        assert len(passes) == num_passes, "micro-batches: once, or twice"
        assert engine._forward_cache.num_bytes == 0
    same(*outcomes)


@pytest.mark.parametrize("deterministic", [False, True])
def test_runs_of_one_batch_get_the_bits_that_they_get_alone(qwen3_dir, deterministic):
    names = ["a", "bb", "ccc"]
    keeping, anew = (load(qwen3_dir, kept, budget=512, deterministic=deterministic) for kept in (MANY, 0))
    outcomes = {}
    for engine in (keeping, anew):
        for place, name in enumerate(names):
            add_run(engine, name, rank=2 + place)
    forwards = [(name, Forward(data(zero, seed=7 * i, num=6), "cross_entropy", {})) for i, name in enumerate(names)]
    backwards = [
        (name, ForwardBackward(data(slope, seed=7 * i, num=6), "cross_entropy", {})) for i, name in enumerate(names)
    ]
    first, second = keeping.compute(forwards), keeping.compute(backwards)
    for place, name in enumerate(names):
        outcomes[name] = (
            bits(first[place].logprobs),
            bits(second[place].logprobs),
            keeping._runs[name].accumulated.grad_P,
        )
        (alone_first,), (alone_second,) = anew.compute([forwards[place]]), anew.compute([backwards[place]])
        grad_P = anew._runs[name].accumulated.grad_P
        same(outcomes[name], (bits(alone_first.logprobs), bits(alone_second.logprobs), grad_P))


def test_several_forwards_wait_for_their_backwards(qwen3_dir, monkeypatch):
    """As a client sends them that cuts a large batch into several calls."""
    engine, anew = load(qwen3_dir), load(qwen3_dir, 0)
    for each in (engine, anew):
        add_run(each, "run")
        if each is engine:
            passes = count_passes(engine, monkeypatch)
        for seed in (0, 20, 40):
            each.forward("run", data(zero, seed=seed, num=2), "cross_entropy", {})
        for seed in (0, 20, 40):
            each.forward_backward("run", data(slope, seed=seed, num=2), "cross_entropy", {})
    assert len(passes) == 3
    assert torch.equal(engine._runs["run"].accumulated.grad_P, anew._runs["run"].accumulated.grad_P)


def test_other_tokens_or_targets_are_computed_anew(qwen3_dir, monkeypatch):
    engine = load(qwen3_dir, budget=512)
    add_run(engine, "run")
    given = datum(0, 12, zero)
    engine.forward("run", [given], "cross_entropy", {})
    passes = count_passes(engine, monkeypatch)
    targets = given.loss_inputs["target_tokens"].values()
    tokens = given.tokens.values()
    for others, many in (
        (Datum(given.tokens, {"target_tokens": Tensor.of([*targets[:-1], IGNORED_TARGET], "int64")}), 0),
        (Datum(given.tokens, {"target_tokens": Tensor.of([*targets[:-1], 5], "int64")}), 0),
        (Datum(Tensor.of([5, *tokens[1:]], "int64"), given.loss_inputs), 0),
        (given, 2),
    ):
        engine.forward_backward("run", [others], "cross_entropy", {}, many)
    assert len(passes) == 4
    engine.forward_backward("run", [given], "cross_entropy", {})
    assert len(passes) == 4


@pytest.mark.parametrize("change", ["step", "empty-step", "load", "restore", "init", "remove"])
def test_other_weights_serve_nothing_that_was_kept(qwen3_dir, tmp_path, monkeypatch, change):
    engine = load(qwen3_dir)
    add_run(engine, "run")
    engine.save_trainer_checkpoint("run", tmp_path / "saved")
    engine.snapshot("run", tmp_path / "snapshot")
    if change == "step":
        engine.forward_backward("run", data(slope, seed=50), "cross_entropy", {})
    engine.forward("run", data(zero), "cross_entropy", {})
    assert engine._forward_cache.num_bytes > 0
    graph = weakref.ref(engine._forward_cache._runs["run"].forwards[0].scores.logprobs)
    if change in ("step", "empty-step"):
        engine.optim_step("run", ADAM)
    elif change == "load":
        engine.load_checkpoint("run", tmp_path / "saved", with_optimizer=False)
    elif change == "restore":
        engine.restore("run", tmp_path / "snapshot")
    elif change == "init":
        engine.init_run("run", rank=4, seed=3)
    else:
        engine.remove_run("run")
        add_run(engine, "run")
    assert engine._forward_cache.num_bytes == 0
    gc.collect()
    assert graph() is None
    passes = count_passes(engine, monkeypatch)
    engine.forward_backward("run", data(slope), "cross_entropy", {})
    assert len(passes) == 3


def test_a_trajectory_is_the_same_with_and_without(qwen3_dir):
    finals = []
    for forward_cache_bytes in (MANY, 0):
        engine = load(qwen3_dir, forward_cache_bytes)
        add_run(engine, "run")
        for step in range(3):
            both(engine, "run", seed=step)
            engine.optim_step("run", ADAM)
        finals.append(engine._runs["run"].theta_P)
    assert torch.equal(*finals)


def test_the_limit_lets_the_oldest_go(qwen3_dir, monkeypatch):
    engine = load(qwen3_dir)
    add_run(engine, "run")
    add_run(engine, "other")
    engine.forward("run", data(zero, num=1), "cross_entropy", {})
    one = engine._forward_cache.num_bytes
    limited = load(qwen3_dir, 2 * one)
    for name in ("run", "other"):
        add_run(limited, name)
    for name, seed in (("run", 0), ("other", 10), ("other", 20)):
        limited.forward(name, data(zero, seed=seed, num=1), "cross_entropy", {})
        assert 0 < limited._forward_cache.num_bytes <= 2 * one
    passes = count_passes(limited, monkeypatch)
    for name, seed in (("other", 10), ("other", 20), ("run", 0)):
        limited.forward_backward(name, data(slope, seed=seed, num=1), "cross_entropy", {})
    assert len(passes) == 1, "only the oldest had to go"
    too_small = load(qwen3_dir, one - 1)
    add_run(too_small, "run")
    too_small.forward("run", data(zero, num=1), "cross_entropy", {})
    assert too_small._forward_cache.num_bytes == 0


def test_a_run_s_own_habit_counts(qwen3_dir):
    """Forwards with weights are kept once a backward has followed one; forwards of zeros no longer if none does."""
    engine = load(qwen3_dir)
    add_run(engine, "run")

    def keeps(weight, seed):
        before = engine._forward_cache.num_bytes
        engine.forward("run", data(weight, seed=seed), "cross_entropy", {})
        return engine._forward_cache.num_bytes > before

    assert not keeps(slope, 0), "an evaluation, as far as anyone knows"
    engine.forward_backward("run", data(slope, seed=0), "cross_entropy", {})
    engine.optim_step("run", ADAM)
    assert keeps(slope, 1)
    engine.optim_step("run", ADAM)
    assert not keeps(slope, 2)
    engine.optim_step("run", ADAM)
    assert not keeps(zero, 3)
    engine.remove_run("run")
    add_run(engine, "run")
    assert keeps(zero, 4)


def test_small_forwards_of_several_runs_share_a_pass_instead(qwen3_dir, monkeypatch):
    engine = load(qwen3_dir, budget=512)
    add_run(engine, "a")
    add_run(engine, "bb")
    passes = count_passes(engine, monkeypatch)
    engine.compute([(name, Forward(data(zero, num=1), "cross_entropy", {})) for name in ("a", "bb")])
    assert len(passes) == 1
    assert engine._forward_cache.num_bytes == 0
