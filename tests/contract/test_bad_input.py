"""Whatever a client sends, it gets a 4xx that names the field, at once; and the worker goes on."""

import json
from collections.abc import Iterator

import httpx
import pytest

from gateway import MODEL, Gateway, Json, Run, datum, new_session, ok, tensor, words

# The official client retries these for ten minutes unless the answer says that a gateway refused it.
RETRIED = {400, 404, 408, 502}
TOO_LARGE = 24 * 1024 * 1024 + 64 * 1024 + 1
DEEP = 200_000

GOOD = datum(words(1))


@pytest.fixture(scope="module")
def run(gateway: Gateway, http: httpx.Client) -> Iterator[Run]:
    """A run that all bad input of this module goes to; at the end the worker must be the same, and work."""
    run = Run.create(http, seed=1, max_seq_len=32).attached()
    run.train(1)
    expected, worker = run.logprobs(), gateway.worker_pid()
    yield run
    assert gateway.worker_pid() == worker
    assert run.logprobs() == expected
    assert run.policy_version() == 1
    sample = {"prompt": words(1), "max_tokens": 3}
    assert len(ok(http.post(run.resource["sampler"]["base_url"] + "/sample", json=sample))["choices"]) == 1


@pytest.fixture(scope="module")
def sampler(run: Run) -> str:
    return f"/loops/samplers/{run.resource['sampler']['id']}"


def check_refused(response: httpx.Response, status: int, names: str) -> None:
    assert response.status_code == status, response.text[:1000]
    body = response.json()
    assert names in body["detail"][:2000]
    assert body["message"] == body["detail"]
    assert body["details"]["reason"]
    assert len(response.content) < 4096, "an error does not repeat the request"
    if response.url.path.startswith("/loops/"):
        assert response.headers["X-Baseten-Error-Source"] == "06"
        assert response.headers["X-Baseten-Error-Code"]
    else:
        assert "X-Baseten-Error-Source" not in response.headers


def loss(*data: object, **fields: object) -> Json:
    return {"data": list(data), "loss_fn": "cross_entropy"} | fields


def with_inputs(**inputs: object) -> Json:
    """A good datum with other loss inputs; ``...`` leaves one out."""
    merged = GOOD["loss_fn_inputs"] | inputs
    return GOOD | {"loss_fn_inputs": {k: v for k, v in merged.items() if v is not ...}}


def with_tokens(tokens: object) -> Json:
    return GOOD | {"model_input": {"chunks": [{"type": "encoded_text", "tokens": tokens}]}}


def targets(values: list[object], dtype: str = "int64", shape: list[int] | None = None) -> Json:
    return with_inputs(target_tokens=tensor(values, dtype) | ({} if shape is None else {"shape": shape}))


N = len(words(1)) - 1
ONES = [1.0] * N
LONG = list(range(3, 36))
IMAGE = {"type": "image", "data": "", "format": "png", "expected_tokens": 3}

PAIRED = with_inputs(ref_logprobs=tensor(ONES))


def two(num_columns: int = 2, **inputs: object) -> Json:
    """A good datum with several targets a token."""
    targets = {"data": [[3] * num_columns] * N, "dtype": "int64", "shape": [N, num_columns]}
    return with_inputs(target_tokens=targets, **inputs)


TWO, THREE = two(), two(3)

LOSS_CALLS: dict[str, tuple[Json, str]] = {
    "no data": (loss(), "data"),
    "data missing": ({"loss_fn": "cross_entropy"}, "data"),
    "data null": (loss() | {"data": None}, "data"),
    "data a string": (loss() | {"data": "text"}, "data"),
    "datum null": (loss(GOOD, None), "data[1]"),
    "unknown loss": (loss(GOOD, loss_fn="hinge"), "loss_fn: one of cross_entropy"),
    "loss null": (loss(GOOD, loss_fn=None), "loss_fn"),
    "unknown config": (loss(GOOD, loss_fn_config={"beta": 1.0}), "loss_fn_config.beta"),
    "config of a wrong type": (loss(GOOD, loss_fn_config={"skip_token_normalization": 1.0}), "skip_token_normal"),
    "config a list": (loss(GOOD, loss_fn_config=[]), "loss_fn_config"),
    "top-k too many": (loss(GOOD, top_k_logprobs=21), "top_k_logprobs: 0 to 20"),
    "top-k negative": (loss(GOOD, top_k_logprobs=-1), "top_k_logprobs: 0 to 20"),
    "top-k a fraction": (loss(GOOD, top_k_logprobs=1.5), "top_k_logprobs"),
    "unknown field": (loss(GOOD, surprise=1), "surprise"),
    "unknown field of a datum": (loss(GOOD | {"surprise": 1}), "surprise"),
    "no model_input": (loss({"loss_fn_inputs": GOOD["loss_fn_inputs"]}), "model_input"),
    "no tokens": (loss(with_tokens([])), "data[0].model_input"),
    "no chunks": (loss(GOOD | {"model_input": {"chunks": []}}), "data[0].model_input"),
    "image": (loss(GOOD | {"model_input": {"chunks": [IMAGE]}}), "data[0].model_input.chunks[0]"),
    "unknown chunk": (loss(GOOD | {"model_input": {"chunks": [{"type": "audio"}]}}), "chunks"),
    "token a string": (loss(with_tokens(["3"])), "tokens"),
    "token a fraction": (loss(with_tokens([3.5])), "tokens"),
    "token null": (loss(with_tokens([None])), "tokens"),
    "token true": (loss(with_tokens([True])), "tokens"),
    "token negative": (loss(GOOD, with_tokens([-1] * N)), "data[1].model_input: token ids from 0 to 263, got -1"),
    "token out of vocabulary": (loss(with_tokens([264] * N)), "data[0].model_input: token ids from 0 to 263, got 264"),
    "token beyond int64": (loss(with_tokens([2**70] * N)), "data[0].model_input"),
    "too long": (loss(datum(LONG, LONG)), "data[0].model_input: at most max_seq_len = 32 tokens, got 33"),
    "no targets": (loss(with_inputs(target_tokens=...)), "data[0].loss_fn_inputs.target_tokens"),
    "target out of vocabulary": (loss(targets([264] * N)), "data[0].loss_fn_inputs.target_tokens"),
    "target negative": (loss(targets([-1] * N)), "data[0].loss_fn_inputs.target_tokens"),
    "target beyond int64": (loss(targets([2**70] * N)), "data[0].loss_fn_inputs.target_tokens"),
    "target a fraction": (loss(targets([1.5] * N)), "data[0].loss_fn_inputs.target_tokens"),
    "target null": (loss(targets([None] * N)), "data[0].loss_fn_inputs.target_tokens"),
    "target of a float type": (loss(targets([3] * N, "float32")), "target_tokens.dtype"),
    "target of no type": (loss(targets([3] * N, "words")), "target_tokens.dtype"),
    "lengths differ": (loss(targets([3] * (N - 1))), "data[0].loss_fn_inputs.target_tokens"),
    "shape differs": (loss(targets([3] * N, shape=[N + 1])), "target_tokens.shape"),
    "shape negative": (loss(targets([3] * N, shape=[-N])), "target_tokens.shape"),
    "shape empty": (loss(targets([3] * N, shape=[])), "target_tokens.shape"),
    "nested targets": (loss(targets([[3]] * N)), "target_tokens.shape"),
    "nested in three": (loss(targets([[[3]]] * N, shape=[N, 1, 1])), "data[0].loss_fn_inputs"),
    "shape of three": (loss(targets([3] * N, shape=[N, 1, 1])), "target_tokens.shape: [N] or [N, K]"),
    "no column": (loss(targets([], shape=[N, 0])), "target_tokens.shape: at least one target"),
    "columns negative": (loss(targets([3] * N, shape=[-1, -N])), "target_tokens.shape"),
    "rows negative": (loss(targets([3] * N, shape=[-N, 1])), "target_tokens.shape"),
    "ragged columns": (loss(targets([[3, 3]] * (N - 1) + [[3]], shape=[N, 2])), "target_tokens.shape"),
    "half nested": (loss(targets([[3, 3]] * (N - 1) + [3, 3], shape=[N, 2])), "target_tokens.shape"),
    "too few rows": (loss(targets([[3, 3]] * (N - 1), shape=[N - 1, 2])), "data[0].loss_fn_inputs.target_tokens"),
    "too few columns": (loss(targets([3] * N, shape=[N, 2])), "target_tokens.shape"),
    "column null": (loss(targets([[3, None]] * N, shape=[N, 2])), "target_tokens.data"),
    "column out of vocabulary": (loss(targets([[3, 264]] * N, shape=[N, 2])), "target_tokens.data: token ids from 0"),
    "columns differ": (loss(TWO, THREE), "data[1].loss_fn_inputs.target_tokens.shape: [N, 2] as in data[0]"),
    "columns and none": (loss(TWO, GOOD), "data[1].loss_fn_inputs.target_tokens.shape: [N, 2] as in data[0]"),
    "none and columns": (loss(GOOD, TWO), "data[1].loss_fn_inputs.target_tokens.shape: [N] as in data[0]"),
    "weights without columns": (loss(two(weights=tensor(ONES))), "data[0].loss_fn_inputs.weights.shape"),
    "weights of other columns": (
        loss(two(weights={"data": [1.0] * 3 * N, "dtype": "float32", "shape": [N, 3]})),
        "data[0].loss_fn_inputs.weights.shape",
    ),
    "weights with a null": (
        loss(two(weights={"data": [[1.0, None]] * N, "dtype": "float32", "shape": [N, 2]})),
        "data[0].loss_fn_inputs.weights",
    ),
    "columns for a policy loss": (
        loss(two(logprobs=tensor(ONES), advantages=tensor(ONES)), loss_fn="ppo"),
        "target_tokens.shape: [N], one row a token",
    ),
    "no advantages": (loss(with_inputs(logprobs=tensor(ONES)), loss_fn="dppo"), "data[0].loss_fn_inputs.advantages"),
    "config of dppo": (
        loss(with_inputs(logprobs=tensor(ONES), advantages=tensor(ONES)), loss_fn="dppo", loss_fn_config={"beta": 1}),
        "loss_fn_config.beta",
    ),
    "negative clip": (loss(GOOD, loss_fn="ppo", loss_fn_config={"clip_low_threshold": -0.1}), "clip_low_threshold"),
    "clip bounds swapped": (
        loss(GOOD, loss_fn="cispo", loss_fn_config={"clip_low_threshold": 1.3}),
        "loss_fn_config.clip_low_threshold: at most clip_high_threshold = 1.2",
    ),
    "absurd beta": (loss(GOOD, loss_fn="dro", loss_fn_config={"beta": 1e300}), "loss_fn_config.beta"),
    "smoothing that turns pairs round": (
        loss(PAIRED, PAIRED, loss_fn="dpo", loss_fn_config={"label_smoothing": 0.6}),
        "loss_fn_config.label_smoothing: a number from 0 to 0.5",
    ),
    "half a pair": (loss(PAIRED, PAIRED, PAIRED, loss_fn="dpo"), "data: pairs of a chosen and a rejected datum"),
    "pair without a reference": (loss(PAIRED, GOOD, loss_fn="dpo"), "data[1].loss_fn_inputs.ref_logprobs"),
    "pair with two references": (
        loss(PAIRED, with_inputs(ref_logprobs=tensor(ONES), logprobs=tensor(ONES)), loss_fn="dpo"),
        "data[1].loss_fn_inputs.logprobs: dpo takes exactly one of ref_logprobs, logprobs",
    ),
    "reference null": (
        loss(PAIRED, with_inputs(ref_logprobs=tensor([None] * N)), loss_fn="dpo"),
        "data[1].loss_fn_inputs.ref_logprobs",
    ),
    "reference of one too few": (
        loss(PAIRED, with_inputs(ref_logprobs=tensor(ONES[1:])), loss_fn="dpo"),
        "data[1].loss_fn_inputs.ref_logprobs",
    ),
    "columns of a pair": (loss(PAIRED, two(ref_logprobs=tensor(ONES)), loss_fn="dpo"), "data[1].loss_fn_inputs.target"),
    "reference for cross entropy": (loss(PAIRED), "data[0].loss_fn_inputs.ref_logprobs"),
    "weights NaN": (loss(with_inputs(weights=tensor([*ONES[1:], None]))), "data[0].loss_fn_inputs.weights"),
    "weights too large": (loss(with_inputs(weights=tensor([1e39] * N))), "data[0].loss_fn_inputs.weights"),
    "weights too short": (loss(with_inputs(weights=tensor(ONES[1:]))), "data[0].loss_fn_inputs.weights"),
    "weights strings": (loss(with_inputs(weights=tensor(["1"] * N))), "data[0].loss_fn_inputs"),
    "unknown input": (loss(with_inputs(advantages=tensor(ONES))), "data[0].loss_fn_inputs.advantages"),
    "routed experts": (loss(GOOD | {"routed_experts_ref": {"uri": "x", "version": 1}}), "routed_experts_ref"),
}


@pytest.mark.parametrize("op", ["forward", "forward_backward"])
@pytest.mark.parametrize("case", LOSS_CALLS)
def test_loss_calls(run: Run, op: str, case: str):
    body, names = LOSS_CALLS[case]
    check_refused(run.post(op, seq=1000, **body), 422, names)


OTHER_CALLS: dict[str, tuple[str, Json, int, str]] = {
    "learning rate negative": ("optim_step", {"adam_params": {"learning_rate": -1}}, 422, "adam_params.learning_rate"),
    "learning rate null": ("optim_step", {"adam_params": {"learning_rate": None}}, 422, "learning_rate"),
    "learning rate a string": ("optim_step", {"adam_params": {"learning_rate": "1"}}, 422, "learning_rate"),
    "learning rate huge": ("optim_step", {"adam_params": {"learning_rate": 1e300}}, 422, "adam_params.learning_rate"),
    "decay huge": ("optim_step", {"adam_params": {"weight_decay": 1e300}}, 422, "adam_params.weight_decay"),
    "eps huge": ("optim_step", {"adam_params": {"eps": 1e300}}, 422, "adam_params.eps"),
    "beta 1": ("optim_step", {"adam_params": {"beta1": 1.0}}, 422, "adam_params.beta1"),
    "eps negative": ("optim_step", {"adam_params": {"eps": -1e-9}}, 422, "adam_params.eps"),
    "unknown adam field": ("optim_step", {"adam_params": {"momentum": 1}}, 422, "momentum"),
    "adam null": ("optim_step", {"adam_params": None}, 422, "adam_params"),
    "clip negative": ("optim_step", {"adam_params": {"grad_clip_norm": -1}}, 422, "adam_params.grad_clip_norm"),
    "save without a name": ("save_state", {}, 422, "name"),
    "empty name": ("save_state", {"name": ""}, 422, "name"),
    "name with a slash": ("save_state", {"name": "a/b"}, 422, "name"),
    "name that climbs": ("save_weights_for_sampler", {"name": ".."}, 422, "name"),
    "endless name": ("save_weights_for_sampler", {"name": "a" * 129}, 422, "name"),
    "name null": ("save_weights_for_sampler", {"name": None}, 422, "name"),
    "ttl zero": ("save_state", {"name": "a", "ttl_seconds": 0}, 422, "ttl_seconds"),
    "load nothing": ("load_state", {}, 422, "path"),
    "load no URI": ("load_state", {"path": "/etc/passwd"}, 422, "path"),
    "load a malformed URI": ("load_state", {"path": "bt://loops:x/weights"}, 422, "path"),
    "load a climbing URI": ("load_state", {"path": "bt://loops:x/weights/.."}, 422, "path"),
    "load an unknown checkpoint": ("load_state", {"path": "bt://loops:aaaaaaa/weights/a"}, 404, "bt://loops:aaaaaaa"),
    "load an unknown one with optimizer": (
        "load_state_with_optimizer",
        {"path": "bt://loops:aaaaaaa/weights/a"},
        404,
        "bt://loops:aaaaaaa",
    ),
    "load a sampler's with optimizer": (
        "load_state_with_optimizer",
        {"path": "bt://loops:aaaaaaa/sampler_weights/a"},
        422,
        "path",
    ),
    "init without rank": ("init_trainer_server", {}, 422, "lora_rank"),
    "init with rank 0": ("init_trainer_server", {"lora_rank": 0}, 422, "lora_rank"),
    "init with a huge rank": ("init_trainer_server", {"lora_rank": 10**9}, 422, "lora_rank"),
    "init another model": ("init_trainer_server", {"lora_rank": 8, "base_model": "no/such"}, 422, "base_model"),
    "of another run": ("optim_step", {"run_id": "aaaaaaa"}, 422, "run_id"),
    "of another model": ("optim_step", {"model": "no/such"}, 422, "model"),
    "seq_id negative": ("optim_step", {"seq_id": -1}, 422, "seq_id"),
    "seq_id zero": ("optim_step", {"seq_id": 0}, 422, "seq_id"),
    "seq_id a string": ("optim_step", {"seq_id": "2"}, 422, "seq_id"),
    "seq_id beyond int64": ("optim_step", {"seq_id": 2**63}, 422, "seq_id"),
    "no such route": ("fine_tune", {}, 404, "/fine_tune"),
}


@pytest.mark.parametrize("case", OTHER_CALLS)
def test_other_calls(run: Run, case: str):
    op, body, status, names = OTHER_CALLS[case]
    check_refused(run.post(op, seq=1000, **body), status, names)


RAW: dict[str, tuple[bytes, int, str]] = {
    "not JSON": (b"{", 422, "body"),
    "no bytes of text": (b"\xff\xfe", 422, "body"),
    "a list": (b"[]", 422, "body"),
    "a number": (b"1", 422, "body"),
    "null": (b"null", 422, "body"),
    "NaN literal": (b'{"data": [NaN], "loss_fn": "cross_entropy"}', 422, "body"),
    "Infinity literal": (b'{"data": Infinity}', 422, "body"),
    "number out of range": (b'{"data": [], "top_k_logprobs": 1e999}', 422, ""),
    "trailing text": (b'{"data": []} x', 422, "body"),
    "broken surrogate": (b'{"loss_fn": "\\ud800", "data": []}', 422, ""),
    "deep lists": (b'{"data": ' + b"[" * DEEP + b"]" * DEEP + b"}", 422, ""),
    "deep objects": (b'{"data": [' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"]}", 422, ""),
    "too large": (b" " * TOO_LARGE, 413, "request body"),
}


@pytest.mark.parametrize("case", RAW)
def test_raw_bodies(run: Run, sampler: str, case: str):
    content, status, names = RAW[case]
    for path in (f"{run.path}/forward_backward", f"{sampler}/sample"):
        check_refused(run.http.post(path, content=content), status, names)


@pytest.mark.parametrize("case", RAW)
def test_raw_bodies_of_management(http: httpx.Client, case: str):
    content, status, names = RAW[case]
    headers = {"Content-Type": "application/json"}
    check_refused(
        http.post("/v1/loops/runs", content=content, headers=headers), status, "" if "literal" in case else names
    )


def test_large_body_of_unknown_length(run: Run):
    parts = (b" " * 1024 * 1024 for _ in range(26))
    check_refused(run.http.post(f"{run.path}/forward", content=parts), 413, "request body")


def test_a_body_just_below_the_limit_is_read(run: Run):
    padding = " " * (24 * 1024 * 1024)
    body = json.dumps({"loss_fn": "hinge", "data": []}) + padding
    check_refused(run.http.post(f"{run.path}/forward", content=body), 422, "loss_fn")


@pytest.mark.parametrize("key", ["../../etc", "a b", "a" * 129, "a/b", "a\\b"])
def test_idempotency_keys(run: Run, key: str):
    headers = {"Idempotency-Key": key}
    response = run.http.post(f"{run.path}/optim_step", json={"seq_id": 1000}, headers=headers)
    check_refused(response, 422, "Idempotency-Key")


def test_operations_that_are_not_there(run: Run):
    check_refused(run.http.get(f"{run.path}/operations/aaaaaaa"), 404, "aaaaaaa")
    check_refused(run.http.post(f"{run.path}/operations/aaaaaaa/cancel"), 404, "aaaaaaa")
    check_refused(run.http.get("/loops/runs/aaaaaaa/health"), 404, "aaaaaaa")
    check_refused(run.http.post("/loops/samplers/aaaaaaa/sample", json={"prompt": [3]}), 404, "aaaaaaa")
    check_refused(run.http.get(f"{run.path}/optim_step"), 405, "optim_step")


SAMPLES: dict[str, tuple[Json, str]] = {
    "no prompt": ({}, "prompt"),
    "empty prompt": ({"prompt": []}, "prompt"),
    "prompt text": ({"prompt": "hello"}, "prompt"),
    "prompt out of vocabulary": ({"prompt": [264], "max_tokens": 1}, "prompt: token ids from 0 to 263"),
    "prompt negative": ({"prompt": [-1], "max_tokens": 1}, "prompt: token ids from 0 to 263"),
    "prompt beyond int64": ({"prompt": [2**70], "max_tokens": 1}, "prompt"),
    "prompt too long": ({"prompt": [3] * 32}, "prompt: at most 31 tokens"),
    "max_tokens too large": ({"prompt": [3] * 30, "max_tokens": 3}, "max_tokens: 1 to 2"),
    "max_tokens zero": ({"prompt": [3], "max_tokens": 0}, "max_tokens"),
    "max_tokens a fraction": ({"prompt": [3], "max_tokens": 1.5}, "max_tokens"),
    "n zero": ({"prompt": [3], "n": 0}, "n: "),
    "n huge": ({"prompt": [3], "n": 10**6}, "n: "),
    "temperature negative": ({"prompt": [3], "temperature": -0.1}, "temperature"),
    "temperature null": ({"prompt": [3], "temperature": None}, "temperature"),
    "top_p zero": ({"prompt": [3], "top_p": 0}, "top_p"),
    "top_p above one": ({"prompt": [3], "top_p": 1.1}, "top_p"),
    "top_k": ({"prompt": [3], "top_k": -2}, "top_k"),
    "seed": ({"prompt": [3], "seed": 2**63}, "seed"),
    "logprobs": ({"prompt": [3], "logprobs": 5}, "logprobs"),
    "prompt_logprobs": ({"prompt": [3], "prompt_logprobs": 21}, "prompt_logprobs"),
    "empty stop": ({"prompt": [3], "max_tokens": 1, "stop": ["a", ""]}, "stop"),
    "stop a number": ({"prompt": [3], "max_tokens": 1, "stop": 3}, "stop"),
    "stop token": ({"prompt": [3], "max_tokens": 1, "stop_token_ids": [264]}, "stop_token_ids"),
    "structured outputs of no kind": ({"prompt": [3], "structured_outputs": {}}, "structured_outputs: exactly one"),
    "structured outputs of two kinds": (
        {"prompt": [3], "structured_outputs": {"json": {}, "regex": "a"}},
        "structured_outputs: exactly one",
    ),
    "structured outputs unknown": ({"prompt": [3], "structured_outputs": {"xml": 1}}, "structured_outputs.xml"),
    "white space of one's own": (
        {"prompt": [3], "structured_outputs": {"json": {}, "whitespace_pattern": " "}},
        "structured_outputs.whitespace_pattern",
    ),
    "schema no JSON": ({"prompt": [3], "structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    "schema broken": ({"prompt": [3], "structured_outputs": {"json": {"type": "x"}}}, "structured_outputs"),
    "no choice": ({"prompt": [3], "structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    "regex broken": ({"prompt": [3], "structured_outputs": {"regex": "("}}, "structured_outputs"),
    "grammar broken": ({"prompt": [3], "structured_outputs": {"grammar": "start: :"}}, "structured_outputs"),
    "image chunks": ({"prompt": [], "model_input_chunks": [IMAGE], "return_token_ids": True}, "model_input_chunks"),
    "routed experts": ({"prompt": [3], "include_routed_experts": True}, "include_routed_experts"),
    "unknown model": ({"prompt": [3], "max_tokens": 1, "model": "no/such"}, "model"),
    "unknown field": ({"prompt": [3], "surprise": 1}, "surprise"),
    "presence_penalty": ({"prompt": [3], "presence_penalty": 3}, "presence_penalty"),
    "logit_bias out of range": ({"prompt": [3], "logit_bias": {"3": 101}}, "logit_bias.3"),
    "logit_bias of no token": ({"prompt": [3], "logit_bias": {"a": 1}}, "logit_bias.a"),
    "logit_bias out of the vocabulary": ({"prompt": [3], "logit_bias": {"264": 1}}, "logit_bias"),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_samples(http: httpx.Client, sampler: str, case: str):
    body, names = SAMPLES[case]
    check_refused(http.post(f"{sampler}/sample", json=body), 422, names)


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("X-Checkpoint-Path", "s3://bucket", 422),
        ("X-Checkpoint-Path", "bt://loops:aaaaaaa/sampler_weights/a", 404),
        ("X-Min-Policy-Version", "-1", 422),
        ("X-Min-Policy-Version", "1.5", 422),
        ("X-Min-Policy-Version", "²", 422),
        ("X-Min-Policy-Version", "", 422),
        ("X-Min-Policy-Version", "9" * 5000, 422),
        ("X-Run-Id", "aaaaaaa", 422),
        ("X-Sampler-Id", "aaaaaaa", 422),
    ],
)
def test_sample_headers(http: httpx.Client, sampler: str, header: str, value: str, status: int):
    sent = [(header.encode(), value.encode("latin-1"))]
    response = http.post(f"{sampler}/sample", json={"prompt": [3], "max_tokens": 1}, headers=sent)
    assert (value if status == 404 else header).lower() in response.text.lower()
    check_refused(response, status, "")


MANAGEMENT: dict[str, tuple[str, str, Json, int, str]] = {
    "run without session": ("POST", "runs", {"session_id": ...}, 422, "session_id"),
    "run without model": ("POST", "runs", {"base_model": ...}, 422, "base_model"),
    "run of a number": ("POST", "runs", {"base_model": 3}, 422, "base_model"),
    "run of a null model": ("POST", "runs", {"base_model": None}, 422, "base_model"),
    "run with an unknown field": ("POST", "runs", {"surprise": 1}, 422, "surprise"),
    "rank zero": ("POST", "runs", {"lora_rank": 0}, 422, "lora_rank"),
    "rank huge": ("POST", "runs", {"lora_rank": 10**9}, 422, "lora_rank"),
    "rank a string": ("POST", "runs", {"lora_rank": "8"}, 422, "lora_rank"),
    "rank true": ("POST", "runs", {"lora_rank": True}, 422, "lora_rank"),
    "rank null": ("POST", "runs", {"lora_rank": None}, 422, "lora_rank"),
    "seed a string": ("POST", "runs", {"seed": "1"}, 422, "seed"),
    "seed beyond int64": ("POST", "runs", {"seed": 2**70}, 422, "seed"),
    "delay beyond int64": ("POST", "runs", {"scale_down_delay_seconds": 2**70}, 422, "scale_down_delay_seconds"),
    "spot": ("POST", "runs", {"availability_model": "spot"}, 422, "availability_model"),
    "replicas": ("POST", "trainers", {"replicas": 2}, 422, "replicas"),
    "sampler replicas": ("POST", "runs", {"sampler_num_replicas": 2}, 422, "sampler_num_replicas"),
    "base checkpoint": ("POST", "trainers", {"base_checkpoint": "hf://a/b"}, 422, "base_checkpoint"),
    "path of a sampler": ("POST", "runs", {"path": "bt://loops:aaaaaaa/sampler_weights/a"}, 422, "path"),
    "sampler of nothing": ("POST", "samplers", {"base_model": ...}, 422, "base_model"),
    "sampler of two things": ("POST", "samplers", {"model_path": "bt://loops:a/weights/b"}, 422, "model_path"),
    "sampler of an unknown model": ("POST", "samplers", {"base_model": "no/such"}, 404, "no/such"),
    "sampler too long": ("POST", "samplers", {"max_seq_length": 257}, 422, "max_seq_length"),
    "sampler on spot": ("POST", "samplers", {"availability_model": "spot"}, 422, "availability_model"),
    "two sampler replicas": ("POST", "samplers", {"num_replicas": 2}, 422, "num_replicas"),
    "checkpoints of nothing": ("GET", "checkpoints", {}, 422, "run_id"),
    "checkpoints of two things": ("GET", "checkpoints?run_id=a&base_model=b", {}, 422, "run_id"),
    "checkpoints of an unknown run": ("GET", "checkpoints?run_id=aaaaaaa", {}, 404, "aaaaaaa"),
    "checkpoints of a malformed path": ("GET", "checkpoints?checkpoint_path=x", {}, 422, "checkpoint_path"),
    "unknown scope": ("GET", "runs?scope=world", {}, 422, "scope"),
    "unknown use case": ("GET", "capabilities?use_case=chess", {}, 422, "use_case"),
    "page size zero": ("GET", "checkpoints/aaaaaaa/files?page_size=0", {}, 422, "page_size"),
    "unknown checkpoint": ("GET", "checkpoints/aaaaaaa/files", {}, 404, "aaaaaaa"),
    "validate nothing": (
        "POST",
        "checkpoints/validate",
        {"session_id": ..., "base_model": ...},
        422,
        "checkpoint_path",
    ),
    "unknown session": ("GET", "sessions/aaaaaaa", {}, 404, "aaaaaaa"),
    "unknown run to end": ("POST", "runs/aaaaaaa/deactivate", {}, 404, "aaaaaaa"),
    "unknown sampler to end": ("POST", "samplers/aaaaaaa/deactivate", {}, 404, "aaaaaaa"),
    "unknown deployment to end": ("POST", "deployments/aaaaaaa/deactivate", {}, 404, "aaaaaaa"),
    "no such route": ("POST", "rockets", {}, 404, "rockets"),
    "no such method": ("DELETE", "runs", {}, 405, "runs"),
}


@pytest.mark.parametrize("case", MANAGEMENT)
def test_management(http: httpx.Client, case: str):
    method, path, fields, status, names = MANAGEMENT[case]
    body = {"session_id": new_session(http), "base_model": MODEL} | fields
    sent = {k: v for k, v in body.items() if v is not ...} if method == "POST" else None
    check_refused(http.request(method, f"/v1/loops/{path}", json=sent), status, names)


# -- what can only fail while it runs -----------------------------------------------------------------


def test_a_loss_that_overflows_is_an_error_of_the_operation_alone(http: httpx.Client):
    run = Run.create(http, seed=1).attached()
    run.train(1)
    expected = run.logprobs()
    huge = datum(words(1), weights=[3e38] * len(words(1)[1:]))
    outcome = run.outcome(run.submit("forward_backward", data=[huge], loss_fn="cross_entropy"))
    assert outcome["status"] == "error"
    assert "not finite" in outcome["error"]
    assert run.logprobs() == expected
    run.train(2)
    other = Run.create(http, seed=1).attached()
    other.train(1, 2)
    assert run.state() == other.state()


def test_a_step_that_blows_up_leaves_the_worker_standing(gateway: Gateway, http: httpx.Client):
    worker = gateway.worker_pid()
    run = Run.create(http).attached()
    run.train(1)
    good = run.save("good")
    run.forward_backward([GOOD])
    while run.outcome(run.submit("forward", data=[GOOD], loss_fn="cross_entropy"))["status"] == "done":
        run.forward_backward([GOOD])
        run.step(learning_rate=9e8)
        assert run.policy_version() < 10
    run.save("diverged", "save_weights_for_sampler")
    sampler = f"/loops/samplers/{run.resource['sampler']['id']}"
    check_refused(http.post(f"{sampler}/sample", json={"prompt": [3], "max_tokens": 1}), 409, "not finite")
    assert run.do("load_state_with_optimizer", path=good) == {"step": 1}
    run.train(2)
    assert gateway.worker_pid() == worker


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/loops/runs"),
        ("POST", "/loops/runs"),
        ("POST", "/api/v1/nothing"),
        ("POST", "/oai/api/v1/chat"),
        ("POST", "/anthropic/api/v1/nothing/x/y"),
        # The page is for browsers, which say that they take HTML.
        ("GET", "/"),
    ],
)
def test_a_path_that_is_not_there_says_what_is(http: httpx.Client, method: str, path: str):
    response = http.request(method, path)
    assert response.status_code == 404
    body = response.json()
    message = body["error"]["message"] if "error" in body else body["message"]
    for base in ("/v1/loops", "/api/v1", "/oai/api/v1", "/anthropic/api/v1", "/openapi.json"):
        assert base in message
