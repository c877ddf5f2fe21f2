"""Routes that a sample records are those that training takes again, and nothing else of the router is replayed."""

from pathlib import Path

import pytest
import torch

import tiny_models
from selfloop.engine.engine import Engine
from selfloop.engine.routing import Mixtures
from selfloop.types.datum import Datum, Tensor
from selfloop.types.errors import BadRequest
from selfloop.types.operation import AdamParams
from selfloop.types.routes import MAX_ROUTES_BYTES, Routes, SampledRoutes
from selfloop.types.sampling import AdapterRef, SampleRequest, SampleResult, SamplingParams

PROMPT = [1, *range(5, 40)]  # more than two pages of the cache


@pytest.fixture(scope="module", params=["qwen3-moe", "qwen2-moe"])
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(request.param, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> Engine:
    engine = Engine.load(model_dir, device="cpu", dtype="float32")
    engine.init_run("r", rank=4, seed=3)
    engine.forward_backward("r", [datum(list(range(20, 60)))], "cross_entropy", {})
    engine.optim_step("r", AdamParams(learning_rate=0.05))
    engine.publish("r", "a")
    return engine


def sample(engine: Engine, id: str, prompt: list[int] = PROMPT, n: int = 3, *, routes: bool = True) -> SampleResult:
    params = SamplingParams(max_tokens=9, seed=5, use_end_tokens=False)
    engine.submit_sample(SampleRequest(id, prompt, n, params, AdapterRef("a"), routes=routes))
    while True:
        for result in engine.sample_step():
            if result.request_id == id:
                return result


def datum(tokens: list[int], routes: Routes | None = None) -> Datum:
    inputs = {"target_tokens": Tensor.of(tokens[1:], "int64")}
    return Datum(Tensor.of(tokens[:-1], "int64"), inputs, routes)


def routes_of(sampled: SampledRoutes, index: int) -> Routes:
    data = sampled.prompt + sampled.sequences[index]
    return Routes(sampled.shape, [(0, len(data) // sampled.shape.token_bytes)], data)


def logprobs(engine: Engine, *data: Datum) -> list[list[float]]:
    return [list(values.values()) for values in engine.forward("r", list(data), "cross_entropy", {}).logprobs]


def mixtures(engine: Engine) -> Mixtures:
    found = Mixtures.of(engine._model.spec)
    assert found is not None
    return found


def other(engine: Engine, routes: Routes) -> Routes:
    """Every token goes to the expert after the one that was chosen, in every layer."""
    own = mixtures(engine)
    return Routes(routes.shape, routes.spans, own.packed((own.unpacked(routes.data) + 1) % own.num_experts))


def test_every_token_of_prompt_and_samples_but_the_last_is_recorded(engine: Engine):
    result = sample(engine, "x")
    assert result.routes is not None
    size = result.routes.shape.token_bytes
    assert len(result.routes.prompt) == len(PROMPT) * size
    assert [len(s) // size for s in result.routes.sequences] == [len(s.tokens) - 1 for s in result.sequences]
    assert sample(engine, "y", routes=False).routes is None


def test_recorded_routes_are_those_of_a_pass_over_the_whole(engine: Engine):
    """Prefill and decode choose as the trainer does, so that replaying what was recorded changes nothing."""
    result = sample(engine, "x")
    assert result.routes is not None
    for index, sequence in enumerate(result.sequences):
        whole = [*PROMPT, *sequence.tokens]
        routes = routes_of(result.routes, index)
        (anew,), (again,) = (logprobs(engine, datum(whole, given)) for given in (None, routes))
        assert again == anew
        assert again[len(PROMPT) - 1 :] == pytest.approx(sequence.logprobs, abs=1e-5)


def test_a_prompt_that_is_cached_is_recorded_all_the_same(engine: Engine):
    before = sample(engine, "x")
    sample(engine, "y", routes=False)
    again = sample(engine, "z")
    assert sample(engine, "w", routes=False).num_cached > 0
    assert again.num_cached == 0
    assert again.routes == before.routes


def test_requests_side_by_side_are_recorded_apart(engine: Engine):
    alone = sample(engine, "x")
    prompts = [[7, 8, 9, 10], PROMPT, [*PROMPT[:20], 3, 4]]
    params = SamplingParams(max_tokens=9, seed=5, use_end_tokens=False)
    for i, prompt in enumerate(prompts):
        engine.submit_sample(SampleRequest(str(i), prompt, 3, params, AdapterRef("a"), routes=i != 2))
    found: dict[str, SampleResult] = {}
    while len(found) < len(prompts):
        found |= {result.request_id: result for result in engine.sample_step()}
    assert found["2"].routes is None
    assert found["1"].routes == alone.routes


def test_other_routes_are_taken_and_only_where_they_are_given(engine: Engine):
    whole = [*PROMPT, *sample(engine, "x", routes=False).sequences[0].tokens]
    recorded = sample(engine, "y").routes
    assert recorded is not None
    routes = other(engine, routes_of(recorded, 0))
    natural, replayed = (logprobs(engine, datum(whole, given))[0] for given in (None, routes))
    assert abs(torch.tensor(natural) - torch.tensor(replayed)).max() > 1e-3
    # From position 30 on: what is before it is routed anew.
    size = routes.shape.token_bytes
    some = Routes(routes.shape, [(30, 10)], routes.data[30 * size : 40 * size])
    partly = logprobs(engine, datum(whole, some))[0]
    assert partly[:30] == pytest.approx(natural[:30], abs=1e-5)
    assert abs(torch.tensor(partly[30:]) - torch.tensor(natural[30:])).max() > 1e-3


def test_datums_with_and_without_routes_share_a_pass(engine: Engine):
    whole = [*PROMPT, *sample(engine, "x", routes=False).sequences[0].tokens]
    recorded = sample(engine, "y").routes
    assert recorded is not None
    routes = other(engine, routes_of(recorded, 0))
    data = [datum(whole, routes), datum(whole), datum(whole[:11]), datum(whole, routes)]
    together = logprobs(engine, *data)
    for each, own in zip(data, together, strict=True):
        assert own == pytest.approx(logprobs(engine, each)[0], abs=1e-5)


def test_a_forward_that_is_kept_serves_the_backward_of_its_own_routes_only(model_dir: Path):
    """The clients' loss of their own is two calls on the same tokens."""
    grads: list[float] = []
    zeros, ones = (Tensor.of([value] * 39, "float32") for value in (0.0, 1.0))
    tokens = list(range(20, 60))
    engine = Engine.load(model_dir, device="cpu", dtype="float32")
    for first, second in ((None, 1), (1, 1), (1, None), (None, None)):
        engine.init_run("r", rank=4, seed=3)
        own = mixtures(engine)
        data = own.packed(torch.ones(39, own.shape.num_layers, own.shape.top_k) * torch.tensor([0, 2]))
        given = {None: None, 1: Routes(own.shape, [(0, 39)], data)}
        for call, routes, weights in (
            (engine.forward, given[first], zeros),
            (engine.forward_backward, given[second], ones),
        ):
            inputs = {"target_tokens": Tensor.of(tokens[1:], "int64"), "weights": weights}
            call("r", [Datum(Tensor.of(tokens[:-1], "int64"), inputs, routes)], "cross_entropy", {})
        grads.append(engine.optim_step("r", AdamParams()).metrics["grad_norm"])
    assert grads[0] == pytest.approx(grads[1], rel=1e-5)
    assert grads[2] == pytest.approx(grads[3], rel=1e-5)
    assert abs(grads[0] - grads[2]) > 1e-4


def test_the_result_says_how_many_tokens_were_replayed(engine: Engine):
    result = sample(engine, "x")
    assert result.routes is not None
    whole = [*PROMPT, *result.sequences[0].tokens]
    data = [datum(whole, routes_of(result.routes, 0)), datum(whole)]
    metrics = engine.forward("r", data, "cross_entropy", {}).metrics
    assert metrics["num_replayed_tokens"] == len(whole) - 1
    assert "num_replayed_tokens" not in engine.forward("r", [datum(whole)], "cross_entropy", {}).metrics


def test_routes_that_are_not_this_models_are_refused(engine: Engine):
    own, tokens = mixtures(engine), list(range(20, 32))
    size, shape = own.shape.token_bytes, own.shape
    for routes in (
        Routes(type(shape)(shape.dtype, shape.num_layers + 1, shape.top_k), [(0, 1)], bytes(size)),
        Routes(shape, [(0, 2)], bytes(size)),
        Routes(shape, [(11, 1)], bytes(size)),
        Routes(shape, [(0, 1)], bytes([own.num_experts]) * size),
    ):
        with pytest.raises(BadRequest, match=r"data\[0\]"):
            engine.forward("r", [datum(tokens, routes)], "cross_entropy", {})


def test_what_may_be_recorded_is_bounded(engine: Engine):
    most = MAX_ROUTES_BYTES // mixtures(engine).shape.token_bytes
    params = SamplingParams(max_tokens=200)
    with pytest.raises(BadRequest, match="include_routed_experts"):
        engine.submit_sample(SampleRequest("x", [1], most // 199 + 1, params, routes=True))


def test_a_model_without_experts_refuses(tmp_path: Path):
    engine = Engine.load(tiny_models.save("llama", tmp_path), device="cpu", dtype="float32")
    with pytest.raises(BadRequest, match="include_routed_experts: null or false"):
        engine.submit_sample(SampleRequest("x", [1], 1, SamplingParams(max_tokens=2), routes=True))
    engine.init_run("r", rank=4, seed=0)
    assert not engine.info.routes


@pytest.mark.parametrize("family", ["glm4-moe", "minimax-m2", "mixtral", "qwen3_5-moe"])
def test_routers_of_every_kind_are_recorded_and_replayed(family: str, tmp_path: Path):
    """Sigmoid scores with a correction and groups, softmax over the chosen, and layers with a state beside them."""
    engine = Engine.load(tiny_models.save(family, tmp_path), device="cpu", dtype="float32")
    engine.init_run("r", rank=4, seed=3)
    engine.publish("r", "a")
    result = sample(engine, "x", n=1)
    assert result.routes is not None
    whole, routes = [*PROMPT, *result.sequences[0].tokens], routes_of(result.routes, 0)
    anew, again, elsewhere = (logprobs(engine, datum(whole, r))[0] for r in (None, routes, other(engine, routes)))
    assert again == anew
    assert again[len(PROMPT) - 1 :] == pytest.approx(result.sequences[0].logprobs, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(elsewhere, again, strict=True)) > 1e-3
