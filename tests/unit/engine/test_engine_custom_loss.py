"""Uploaded losses: what the interpreter computes is what the function computes, and no more than it may take."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.engine.losses.custom import MAX_WORK, CustomLossRunner
from selfloop.engine.losses.custom_ops import COMPUTE
from selfloop.types.custom_loss import CustomLoss, LossInput, Node, check
from selfloop.types.custom_loss_ops import OPERATIONS
from selfloop.types.datum import Datum, Tensor
from selfloop.types.errors import BadRequest, OperationFailed
from selfloop.types.settings import EngineLimits
from traced_losses import traced

N, K = 7, 3
VALUES = {
    "logprobs": torch.linspace(-3.0, -0.1, N),
    "old": torch.linspace(-2.5, -0.3, N).flip(0),
    "advantages": torch.tensor([1.0, -1.0, 0.5, 0.0, -0.5, 2.0, 1.5]),
    "mask": torch.tensor([1, 0, 1, 1, 1, 0, 1]),
    "beta": torch.tensor(0.3),
    "wide": torch.linspace(-4.0, -0.2, N * K).reshape(N, K),
}


def ppo(logprobs, old, advantages):
    ratio = torch.exp(logprobs - old)
    clipped = torch.clamp(ratio, 0.8, 1.2)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return loss.sum(), {"custom/clipped:mean": (ratio != clipped).float().mean()}


def masked(logprobs, mask, advantages):
    kept = mask > 0
    loss = -torch.where(kept & (advantages != 0), logprobs * advantages, 0.0)
    return loss.sum() / mask.sum().clamp(min=1), {"custom/kept:sum": kept.sum()}


def pairs(logprobs, old, beta):
    """The first half is chosen, the rest rejected."""
    drift = logprobs - old
    half = logprobs.shape[0] // 2
    delta = beta * (drift[:half].sum() - drift[half:].sum())
    return -F.logsigmoid(delta), {"custom/margin:mean": delta, "custom/right:sum": (delta > 0).float()}


def spread(logprobs, advantages):
    """Every token beside every other."""
    delta = logprobs[:, None] - logprobs[None, :]
    weight = torch.relu(advantages.unsqueeze(1) - advantages.unsqueeze(0))
    loss = (F.softplus(-delta) * weight).mean(dim=(0, 1)) + 0.1 * logprobs.std()
    return loss, {"custom/n:sum": (delta * 0 + 1).sum()}


def distribution(wide):
    normal = torch.log_softmax(wide.float(), dim=-1)
    best = normal.max(dim=-1).values
    entropy = -(normal.exp() * normal).sum(-1, keepdim=True)
    return (entropy.squeeze(-1) - best).mean(), {"custom/entropy:mean": entropy.mean().detach()}


def many_steps(logprobs, advantages):
    n = logprobs.shape[0]
    decay = 0.9 ** torch.arange(n, device=logprobs.device, dtype=logprobs.dtype)
    later = torch.flip(torch.cumsum(torch.flip(advantages, (0,)), 0), (0,))
    stacked = torch.stack([logprobs, later * decay, logprobs**2])
    total = stacked[0].dot(stacked[1]) + math.sqrt(n) * stacked[2].norm()
    return total + torch.zeros_like(logprobs).sum(), {"custom/last:sum": logprobs[-1]}


def doubled(logprobs, mask):
    chosen = logprobs.double().gather(0, torch.topk(logprobs, 3).indices) * mask[:3]
    return torch.logsumexp(torch.cat([chosen, logprobs[::2].double()]), 0), {}


LOSSES: list[tuple[Callable[..., Any], list[str]]] = [
    (ppo, ["logprobs", "old", "advantages"]),
    (masked, ["logprobs", "mask", "advantages"]),
    (pairs, ["logprobs", "old", "beta"]),
    (spread, ["logprobs", "advantages"]),
    (many_steps, ["logprobs", "advantages"]),
    (doubled, ["logprobs", "mask"]),
]


@pytest.mark.parametrize(("function", "names"), LOSSES)
def test_value_metrics_and_gradient_are_those_of_the_function(function: Callable[..., Any], names: list[str]):
    loss = traced(function, {name: VALUES[name].dim() for name in names})
    leaf = VALUES["logprobs"].clone().requires_grad_()
    expected, metrics = function(leaf, *(VALUES[name] for name in names[1:]))
    (grad,) = torch.autograd.grad(expected, leaf)
    found = CustomLossRunner(loss).run(0, VALUES["logprobs"], VALUES, with_grad=True)
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-6)
    assert found.metrics == pytest.approx({name: float(value.detach()) for name, value in metrics.items()})
    torch.testing.assert_close(found.grad, grad)
    assert CustomLossRunner(loss).run(0, VALUES["logprobs"], VALUES, with_grad=False).loss == found.loss


def test_several_targets_a_token():
    def loss_of(logprobs):
        return distribution(logprobs)

    loss = traced(loss_of, {"logprobs": 2})
    leaf = VALUES["wide"].clone().requires_grad_()
    expected, _ = loss_of(leaf)
    found = CustomLossRunner(loss).run(0, VALUES["wide"], {}, with_grad=True)
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(found.grad, torch.autograd.grad(expected, leaf)[0])


def test_every_declared_operation_is_computed():
    assert {signature.name for signature in OPERATIONS.values()} == COMPUTE.keys()


def graph(*steps: Node, result: str = "x") -> CustomLoss:
    """``x`` is what the last of the steps is called."""
    output = Node("output", "output", "output", [{"tuple": [{"ref": result}, {"dict": {}}]}])
    return CustomLoss("f", [LossInput("logprobs", 1)], [Node("placeholder", "lp", "logprobs"), *steps, output])


def call(name: str, target: str, *args: Any, **kwargs: Any) -> Node:
    return Node("call_function", name, target, list(args), kwargs)


LP = {"ref": "lp"}


@pytest.mark.parametrize(
    ("steps", "part"),
    [
        ([call("x", "os.system", "true")], "not among the operations"),
        ([call("x", "torch.load", "file")], "not among the operations"),
        ([call("x", "builtins.eval", "1")], "not among the operations"),
        ([call("x", "torch.rand", 3)], "not among the operations"),
        ([Node("call_method", "x", "__reduce__", [LP])], "not among the operations"),
        ([Node("call_method", "x", "backward", [LP])], "not among the operations"),
        ([Node("call_method", "x", "exp_", [LP])], "not among the operations"),
        ([call("x", "getattr", LP, "__class__")], "must be one of shape"),
        ([call("x", "getattr", LP, "grad_fn")], "must be one of shape"),
        ([call("x", "torch.exp", {"ref": "later"})], "no earlier node"),
        ([call("x", "torch.exp")], "must be a tensor or a number"),
        ([call("x", "torch.exp", "lp")], "must be a tensor or a number"),
        ([call("x", "torch.exp", LP, LP)], "at most 1 arguments"),
        ([call("x", "torch.sum", LP, out=LP)], "takes input, dim"),
        ([call("x", "operator.mul", LP, {"code": "1"})], "an object must be one of"),
        ([call("x", "operator.mul", LP, {"tuple": [1]})], "must be a tensor or a number"),
        ([call("x", "operator.mul", LP, 2**60)], "integers are at most"),
        ([call("lp", "torch.exp", LP)], "a name of its own"),
        ([Node("get_attr", "x", "weight")], "got get_attr where call belongs"),
        ([Node("call_module", "x", "linear", [LP])], "got call_module where call belongs"),
        ([Node("placeholder", "x", "more")], "got placeholder where call belongs"),
    ],
)
def test_what_is_refused_before_it_is_kept(steps: list[Node], part: str):
    with pytest.raises(BadRequest, match=r"^graph\.nodes\[\d+\]: node ") as refused:
        check(graph(*steps))
    assert part in str(refused.value)


@pytest.mark.parametrize(
    ("steps", "part"),
    [
        ([call("x", "torch.zeros", 2**40)], "at most 16777216 elements"),
        ([call("a", "operator.pow", 2, 50), call("x", "torch.zeros", {"ref": "a"})], "at most 16777216 elements"),
        ([Node("call_method", "x", "expand", [LP, 2**30, 7])], "failed"),
        ([Node("call_method", "x", "repeat", [LP, 2**30])], "at most 16777216 elements"),
        ([call("a", "torch.zeros", 2**20), call("x", "torch.unbind", {"ref": "a"})], "at most 4096 pieces"),
        ([call("a", "operator.pow", 10, 15), call("x", "operator.pow", {"ref": "a"}, {"ref": "a"})], "at most 64"),
        ([call("a", "operator.pow", 10, 15), call("x", "operator.mul", {"ref": "a"}, {"ref": "a"})], "at most 9007"),
        ([call("x", "math.log", 0)], "math domain error"),
        ([call("x", "operator.truediv", 1, 0)], "division by zero"),
        ([call("a", "operator.gt", LP, 0), call("x", "operator.getitem", LP, {"ref": "a"})], "torch.where"),
        ([call("x", "operator.getitem", LP, 99)], "out of bounds"),
        ([call("x", "torch.exp", LP)], "without dimensions"),
        ([call("x", "operator.gt", LP, 0)], "floating-point"),
        (
            [Node("call_method", "a", "detach", [LP]), call("x", "torch.sum", {"ref": "a"})],
            "does not depend on logprobs",
        ),
    ],
)
def test_what_fails_on_the_data_names_its_node(steps: list[Node], part: str):
    loss = graph(*steps)
    check(loss)
    with pytest.raises(BadRequest) as refused:
        CustomLossRunner(loss).run(3, VALUES["logprobs"], {}, with_grad=True)
    if part != "failed":
        assert part in str(refused.value)
    assert "data[3]" in str(refused.value) or "does not depend" in part


def test_a_request_may_take_so_much():
    steps = [call("x0", "operator.mul", LP, 1.0)]
    steps += [call(f"x{i}", "operator.mul", {"ref": f"x{i - 1}"}, 1.0) for i in range(1, 1000)]
    loss = graph(*steps, call("x", "torch.sum", {"ref": "x999"}))
    check(loss)
    runner = CustomLossRunner(loss)
    runner.run(0, VALUES["logprobs"], {}, with_grad=True)
    taken = MAX_WORK - runner._work_left
    assert taken > 1000 * 4096
    runner._work_left = taken - 1
    with pytest.raises(BadRequest, match=r"takes too much over this request, at data\[1\]"):
        runner.run(1, VALUES["logprobs"], {}, with_grad=True)


def test_a_loss_that_is_not_finite():
    steps = [call("a", "torch.sum", LP), call("x", "operator.truediv", {"ref": "a"}, 0.0)]
    with pytest.raises(OperationFailed, match=r"data\[0\] is not finite"):
        CustomLossRunner(graph(*steps)).run(0, VALUES["logprobs"], {}, with_grad=True)


def datum(seed: int, num: int) -> Datum:
    ids = tiny_models.random_ids(num + 1, seed)
    inputs = {"target_tokens": Tensor.of(ids[1:], "int64"), "beta": Tensor.of([0.5], "float32", ())}
    inputs["old"] = Tensor.of([-4.0 - i / 10 for i in range(num)], "float32")
    inputs["advantages"] = Tensor.of([math.sin(i) for i in range(num)], "float32")
    return Datum(Tensor.of(ids[:-1], "int64"), inputs)


@pytest.mark.parametrize("budget", [8, 1024])
def test_a_step_on_an_uploaded_loss_is_that_on_the_built_in_one(load: Callable[..., Engine], budget: int):
    engine = load(limits=EngineLimits(train_token_budget=budget))
    data = [datum(seed, num) for seed, num in ((1, 5), (2, 9), (3, 1))]
    for run in ("ours", "theirs"):
        engine.init_run(run, rank=4, seed=1)
        engine._runs[run].theta_P.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    loss = traced(ppo, {"logprobs": 1, "old": 1, "advantages": 1})
    renamed = [
        Datum(d.tokens, {("logprobs" if k == "old" else k): v for k, v in d.loss_inputs.items() if k != "beta"})
        for d in data
    ]
    found = engine.forward_backward("ours", data, "custom", {}, summed=True, custom=loss)
    expected = engine.forward_backward("theirs", renamed, "ppo", {}, summed=True)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.logprobs == expected.logprobs
    ours, theirs = (engine._runs[run].accumulated for run in ("ours", "theirs"))
    assert ours is not None
    assert theirs is not None
    torch.testing.assert_close(ours.grad_P, theirs.grad_P, rtol=1e-4, atol=1e-5)
    alone = [engine.forward("ours", [d], "custom", {}, summed=True, custom=loss).metrics for d in data]
    clipped = [metrics["custom/clipped:mean"] for metrics in alone]
    assert found.metrics["custom/clipped:mean"] == pytest.approx(sum(clipped) / 3)


def test_inputs_must_be_there_as_declared(load: Callable[..., Engine]):
    engine = load()
    engine.init_run("r", rank=4, seed=1)
    loss = traced(ppo, {"logprobs": 1, "old": 1, "advantages": 2})
    with pytest.raises(BadRequest, match=r"data\[0\]\.loss_fn_inputs\.advantages: of rank 2"):
        engine.forward("r", [datum(1, 4)], "custom", {}, summed=True, custom=loss)
