"""What the losses answer over the wire: shapes, metrics, and the likeliest tokens."""

import math

import httpx
import pytest

from gateway import Json, Run, datum, tensor, words

N = len(words(1)) - 1
MASKED = [-100 if i in (0, 4) else token for i, token in enumerate(words(1)[1:])]


@pytest.fixture(scope="module")
def run(http: httpx.Client) -> Run:
    return Run.create(http, seed=1).attached()


def matrix(rows: list[list[float]], dtype: str = "float32") -> Json:
    return {"data": rows, "dtype": dtype, "shape": [len(rows), len(rows[0])]}


def with_targets(targets: Json, **inputs: Json) -> Json:
    good = datum(words(1))
    return good | {"loss_fn_inputs": {"target_tokens": targets} | inputs}


def forward(run: Run, *data: Json, loss_fn: str = "cross_entropy", **fields: object) -> Json:
    return run.do("forward", data=list(data), loss_fn=loss_fn, **fields)


def test_several_targets_flat_and_nested(run: Run):
    single = forward(run, datum(words(1)))
    columns = [words(1)[1:], words(2)[1:]]
    rows = [list(row) for row in zip(*columns, strict=True)]
    rows[3][1] = -100
    weights = [[0.25, 0.75]] * N
    nested = with_targets(matrix(rows, "int64"), weights=matrix(weights))
    flat = with_targets(
        matrix(rows, "int64") | {"data": [t for row in rows for t in row]},
        weights=matrix(weights) | {"data": [w for row in weights for w in row]},
    )
    answer = forward(run, nested, flat)
    first, second = (output["logprobs"] for output in answer["loss_fn_outputs"])
    assert first == second
    assert first["shape"] == [N, 2]
    assert first["data"][::2] == pytest.approx(single["loss_fn_outputs"][0]["logprobs"]["data"], abs=1e-5)
    assert [i for i, value in enumerate(first["data"]) if value is None] == [7]
    loss = -sum(w * lp for w, lp in zip([0.25, 0.75] * N, first["data"], strict=True) if lp is not None)
    assert answer["loss"] == pytest.approx(loss / N, rel=1e-5)
    assert answer["metrics"]["num_trained_tokens"] == 2 * N


def test_one_column_keeps_its_shape(run: Run):
    column = with_targets(matrix([[t] for t in MASKED], "int64"))
    output = forward(run, column)["loss_fn_outputs"][0]["logprobs"]
    plain = forward(run, with_targets(tensor(MASKED, "int64")))["loss_fn_outputs"][0]["logprobs"]
    assert (output["shape"], output["data"]) == ([N, 1], plain["data"])


@pytest.mark.parametrize("op", ["forward", "forward_backward"])
def test_the_likeliest_tokens(run: Run, op: str):
    data = [with_targets(tensor(MASKED, "int64")), datum(words(2, 7))]
    answer = run.do(op, data=data, loss_fn="cross_entropy", top_k_logprobs=4)
    for output, num, masked in zip(answer["loss_fn_outputs"], (N, 6), ((0, 4), ()), strict=True):
        tokens, logprobs = output["topk_token_ids"], output["topk_logprobs"]
        assert (tokens["dtype"], tokens["shape"]) == ("int64", [num, 4])
        assert (logprobs["dtype"], logprobs["shape"]) == ("float32", [num, 4])
        for i in range(num):
            ids, values = tokens["data"][4 * i : 4 * i + 4], logprobs["data"][4 * i : 4 * i + 4]
            if i in masked:
                assert (ids, values) == ([-1] * 4, [None] * 4)
            else:
                assert values == sorted(values, reverse=True)
                assert len(set(ids)) == 4
                own = output["logprobs"]["data"][i]
                assert values[0] >= own - 1e-6
    # What is said of a token is what forward says of it as a target.
    best = [t if t >= 0 else -100 for t in answer["loss_fn_outputs"][0]["topk_token_ids"]["data"][::4]]
    again = forward(run, with_targets(tensor(best, "int64")))["loss_fn_outputs"][0]
    expected = answer["loss_fn_outputs"][0]["topk_logprobs"]["data"][::4]
    assert [v or 0 for v in again["logprobs"]["data"]] == pytest.approx([v or 0 for v in expected], abs=1e-5)
    assert again.keys() == {"logprobs"}


def test_a_pair_whose_reference_is_the_policy_itself(run: Run):
    data = [datum(words(seed, length)) for seed, length in ((1, 12), (2, 7))]
    own = [output["logprobs"] for output in forward(run, *data)["loss_fn_outputs"]]
    pair = [d | {"loss_fn_inputs": d["loss_fn_inputs"] | {"ref_logprobs": q}} for d, q in zip(data, own, strict=True)]
    answer = forward(run, *pair, loss_fn="dpo")
    assert answer["loss"] == pytest.approx(math.log(2), abs=1e-5)
    metrics = answer["metrics"]
    assert (metrics["num_trained_pairs"], metrics["num_trained_tokens"]) == (1, 17)
    assert metrics["margin"] == pytest.approx(0, abs=1e-5)


def test_dppo_on_policy_is_the_negative_advantage(run: Run):
    own = forward(run, datum(words(1)))["loss_fn_outputs"][0]["logprobs"]["data"]
    answer = forward(run, datum(words(1), logprobs=own, advantages=[0.5] * N), loss_fn="dppo")
    assert answer["loss"] == pytest.approx(-0.5, abs=1e-4)
