"""Images over the wire: in training and sampling of both dialects, refused by field, and safe through any death."""

import base64
import os
import signal
from array import array
from collections.abc import Callable
from typing import Any

import httpx
import pytest

import seeing_models
from gateway import Json, Run, create_run, ok, until
from seeing_gateway import SeeingGateway
from seeing_models import AFTER, BEFORE, IMAGE_TOKEN, encoded, picture
from selfloop.server.tinker import schema
from selfloop.types.images import MAX_IMAGES, read_size
from selfloop.types.vision import VisionFacts

PNG = encoded(picture(1, 70, 40))
JPEG = encoded(picture(2, 30, 61), "jpeg")
TEXT = [40, 41, 42, 43, 44]


@pytest.fixture(scope="module", params=seeing_models.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


class SeeingRun(Run):
    """A run on a model that sees."""

    def attached(self) -> "SeeingRun":
        self.do("init_trainer_server", lora_rank=self.resource["lora_rank"])
        return self

    def post(self, op: str, **body: Any) -> httpx.Response:
        return super().post(op, **{"model": self.resource["base_model"]} | body)

    def losses(self, data: list[Json]) -> Json:
        return self.forward_backward(data)["metrics"]


def new_run(seeing: SeeingGateway, family: str, **fields: object) -> SeeingRun:
    return SeeingRun(seeing.http, create_run(seeing.http, base_model=f"tiny/{family}", **fields)).attached()


@pytest.fixture(scope="module")
def run(seeing: SeeingGateway, family: str) -> SeeingRun:
    return new_run(seeing, family)


def num_tokens(facts: VisionFacts, data: bytes, format: str) -> int:
    return facts.sizing.num_tokens(read_size(data, format, "image"))


def image(facts: VisionFacts, data: bytes = PNG, format: str = "png", **other: Any) -> Json:
    chunk = {"type": "image", "data": base64.b64encode(data).decode(), "format": format}
    return chunk | ({} if other else {"expected_tokens": num_tokens(facts, data, format)}) | other


def text(tokens: list[int]) -> Json:
    return {"type": "encoded_text", "tokens": tokens}


def datum(facts: VisionFacts, data: bytes = PNG, format: str = "png") -> Json:
    """Three tokens of text are trained behind an image."""
    num = num_tokens(facts, data, format)
    chunks = [text([*TEXT, BEFORE]), image(facts, data, format), text([AFTER, 50, 51, 52])]
    length = len(TEXT) + 1 + num + 4
    targets = [-100] * (length - 4) + [50, 51, 52, -100]
    return {
        "model_input": {"chunks": chunks},
        "loss_fn_inputs": {"target_tokens": {"data": targets, "dtype": "int64", "shape": [length]}},
    }


def test_training_learns_what_an_image_says(seeing: SeeingGateway, family: str, run: SeeingRun):
    """The same words behind two images have other targets: no model of text alone could tell them apart."""
    facts = seeing.facts[family]
    data = [datum(facts), datum(facts, encoded(picture(3, 70, 40)))]
    data[1]["loss_fn_inputs"]["target_tokens"]["data"][-4:-1] = [60, 61, 62]
    data[1]["model_input"]["chunks"][2]["tokens"] = [AFTER, 60, 61, 62]
    losses = []
    for _ in range(12):
        losses.append(run.losses(data)["loss"])
        run.step(0.02)
    assert losses[-1] < 0.5 * losses[0]


def test_a_jpeg_and_text_in_one_batch(seeing: SeeingGateway, family: str, run: SeeingRun):
    facts = seeing.facts[family]
    plain = {"model_input": {"chunks": [text(TEXT)]}, "loss_fn_inputs": datum_targets([41, 42, 43, 44, -100])}
    result = run.forward([datum(facts, JPEG, "jpeg"), plain])
    assert [len(one["logprobs"]["data"]) for one in result["loss_fn_outputs"]] == [
        num_tokens(facts, JPEG, "jpeg") + len(TEXT) + 5,
        len(TEXT),
    ]


def datum_targets(targets: list[int]) -> Json:
    return {"target_tokens": {"data": targets, "dtype": "int64", "shape": [len(targets)]}}


def sample(seeing: SeeingGateway, run: SeeingRun, chunks: list[Json], **other: Any) -> httpx.Response:
    body = {"prompt": [], "model_input_chunks": chunks, "max_tokens": 6, "temperature": 0.0, "logprobs": 0} | other
    return seeing.http.post(f"/loops/samplers/{run.resource['sampler']['id']}/sample", json=body)


def test_sampling_of_a_prompt_with_images(seeing: SeeingGateway, family: str, run: SeeingRun):
    facts = seeing.facts[family]
    chunks = [text([*TEXT, BEFORE]), image(facts), text([AFTER]), image(facts, JPEG, "jpeg"), text([45])]
    first, again = (ok(sample(seeing, run, chunks)) for _ in range(2))
    num = num_tokens(facts, PNG, "png") + num_tokens(facts, JPEG, "jpeg") + len(TEXT) + 3
    assert first["usage"]["prompt_tokens"] == num
    prompt = first["choices"][0]["prompt_token_ids"]
    assert prompt.count(IMAGE_TOKEN) == num - len(TEXT) - 3
    assert first["choices"][0]["token_ids"] == again["choices"][0]["token_ids"]
    other = ok(sample(seeing, run, [chunks[0], image(facts, encoded(picture(9, 70, 40))), *chunks[2:]]))
    assert other["choices"][0]["logprobs"] != first["choices"][0]["logprobs"]


def test_a_queued_sample_keeps_its_images(seeing: SeeingGateway, family: str, run: SeeingRun):
    chunks = [text(TEXT), image(seeing.facts[family]), text([45])]
    expected = ok(sample(seeing, run, chunks))["choices"][0]["token_ids"]
    url = f"/loops/samplers/{run.resource['sampler']['id']}"
    body = {"prompt": [], "model_input_chunks": chunks, "max_tokens": 6, "temperature": 0.0}
    accepted = seeing.http.post(f"{url}/sample", json=body, headers={"Prefer": "respond-async"})
    assert accepted.status_code == 202, accepted.text
    poll = f"{url}/operations/{accepted.json()['operation_id']}"
    answered = until(lambda: (r := seeing.http.get(poll)).status_code == 200 and r, "the sample is there")
    assert answered.json()["result"]["choices"][0]["token_ids"] == expected


Change = Callable[[VisionFacts], Json]
REFUSED: dict[str, tuple[Change, str, str]] = {
    "another number of tokens": (lambda f: image(f, expected_tokens=3), ".expected_tokens", "got 3"),
    "another format": (lambda f: image(f, format="jpeg", expected_tokens=1), ".data", "jpeg"),
    "no format that is known": (lambda f: image(f, format="gif", expected_tokens=1), ".format", "png or jpeg"),
    "no base64": (lambda f: image(f) | {"data": "%%"}, ".data", "base64"),
    "not base64 of a URL": (lambda f: image(f) | {"data": "http://127.0.0.1/x.png"}, ".data", "base64"),
    "cut off": (lambda f: image(f) | {"data": base64.b64encode(PNG[:-30]).decode()}, ".data", "cut off"),
    "too long a side": (lambda f: image(f, encoded(picture(1, 1000, 2)), expected_tokens=99), "", "got"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_field(seeing: SeeingGateway, family: str, run: SeeingRun, case: str):
    make, field, says = REFUSED[case]
    chunk = make(seeing.facts[family])
    data = [datum(seeing.facts[family]), datum(seeing.facts[family])]
    data[1]["model_input"]["chunks"][1] = chunk
    for response, where in (
        (run.post("forward_backward", data=data, loss_fn="cross_entropy"), f"data[1].model_input.chunks[1]{field}"),
        (sample(seeing, run, [text(TEXT), chunk]), f"model_input_chunks[1]{field}"),
    ):
        assert response.status_code == 422, response.text
        assert where in response.text
        assert says in response.text


def test_too_many_images_are_refused(seeing: SeeingGateway, family: str, run: SeeingRun):
    small = encoded(picture(1, 8, 8))
    chunks = [text(TEXT), *[image(seeing.facts[family], small)] * (MAX_IMAGES + 1)]
    response = sample(seeing, run, chunks)
    assert response.status_code == 422
    assert f"model_input_chunks[{MAX_IMAGES + 1}]" in response.text


def test_what_only_a_decoder_finds_is_the_operations_own_error(seeing: SeeingGateway, family: str, run: SeeingRun):
    """The file is whole by its structure; the outcome names the chunk, and the run goes on."""
    facts = seeing.facts[family]
    at = PNG.find(b"IDAT") + 10
    broken = PNG[:at] + bytes(20) + PNG[at + 20 :]
    assert sample(seeing, run, [text(TEXT), image(facts, broken)]).status_code == 422
    asked = {"data": [datum(facts), datum(facts, broken)], "loss_fn": "cross_entropy"}
    failed = run.outcome(run.submit("forward_backward", **asked))
    assert failed["status"] == "error"
    assert "data[1].model_input.chunks[1].data" in failed["error"]
    assert run.losses([datum(facts)])["loss"] > 0
    run.step()


def test_replay_after_a_death_is_bit_equal(seeing: SeeingGateway, family: str):
    """Operations with images are durable with their bytes: the same weights come out of the journal."""
    facts = seeing.facts[family]
    results: list[Json] = []
    for dies in (False, True):
        run = new_run(seeing, family, seed=7)
        for step in range(3):
            run.losses([datum(facts), datum(facts, JPEG, "jpeg")])
            if dies and step == 1:
                for pid in seeing.gateway.worker_pids():
                    os.kill(pid, signal.SIGKILL)
            run.step(0.01)
        results.append(run.forward([datum(facts)])["loss_fn_outputs"][0])
    assert results[0] == results[1]


def test_a_model_of_text_says_so(http: httpx.Client):
    """By the field, in both dialects, as long as images are not its own."""
    run = Run.create(http).attached()
    body = {
        "prompt": [],
        "model_input_chunks": [{"type": "image", "data": "aGk=", "format": "png", "expected_tokens": 1}],
    }
    response = http.post(f"/loops/samplers/{run.resource['sampler']['id']}/sample", json=body)
    assert response.status_code == 422
    assert "model_input_chunks[0]: encoded_text: the served model takes text only" in response.text


class Tinker:
    """The other dialect's wire, without its client."""

    def __init__(self, seeing: SeeingGateway, family: str) -> None:
        self._http, self._base = seeing.http, f"tiny/{family}"
        self.session = self.ask("create_session", tags=[], sdk_version="0.38.0")["session_id"]
        self._seq = self._steps = 0

    def ask(self, route: str, **body: Any) -> Json:
        return ok(self._http.post(f"/api/v1/{route}", json=body))

    def model(self) -> str:
        asked = {"session_id": self.session, "model_seq_id": 0, "base_model": self._base, "lora_config": {"rank": 4}}
        return self.result(self.ask("create_model", **asked))["model_id"]

    def sampler(self) -> str:
        asked = {"session_id": self.session, "sampling_session_seq_id": 0, "base_model": self._base}
        return self.ask("create_sampling_session", **asked)["sampling_session_id"]

    def result(self, future: Json) -> Json:
        return ok(self.answer(future))

    def answer(self, future: Json) -> httpx.Response:
        def answered() -> httpx.Response | None:
            body = {"request_id": future["request_id"], "allow_metadata_only": True}
            response = self._http.post("/api/v1/retrieve_future", json=body)
            return None if response.status_code == 408 else response

        return until(answered, "the future has a result")

    def sample(self, sampler: str, chunks: list[Json]) -> httpx.Response:
        self._seq += 1
        body = {
            "sampling_session_id": sampler,
            "seq_id": self._seq,
            "prompt": {"chunks": chunks},
            "sampling_params": {"max_tokens": 3, "temperature": 0.0},
        }
        return self._http.post("/api/v1/asample", json=body)

    def train(self, model: str, change: Callable[[Any], None] = lambda _: None) -> httpx.Response:
        """One datum of an image between text, whose own tokens have no weight."""
        self._steps += 1
        message = schema.ForwardBackwardRequest(model_id=model, seq_id=self._steps, loss_fn="cross_entropy")
        one = message.data.add()
        one.model_input.add().encoded_text.tokens = array("i", TEXT).tobytes()
        chunk = one.model_input.add().image
        chunk.data, chunk.format = PNG, "png"
        one.model_input.add().encoded_text.tokens = array("i", [45, 46]).tobytes()
        change(chunk)
        num = len(TEXT) + self.num_tokens + 2
        for name, values, dtype in (
            ("target_tokens", array("q", [0] * (num - 2) + [46, 47]), schema.INT64),
            ("weights", array("f", [0] * (num - 2) + [1, 1]), schema.FLOAT32),
        ):
            tensor = one.loss_fn_inputs[name]
            tensor.dense, tensor.dtype = values.tobytes(), dtype
            tensor.shape.append(num)
        headers = {"Content-Type": "application/x-protobuf"}
        return self._http.post("/api/v1/forward_backward", content=message.SerializeToString(), headers=headers)

    num_tokens = 0


@pytest.fixture(scope="module")
def tinker(seeing: SeeingGateway, family: str) -> Tinker:
    tinker = Tinker(seeing, family)
    tinker.num_tokens = num_tokens(seeing.facts[family], PNG, "png")
    return tinker


def test_tinkers_sampling(seeing: SeeingGateway, family: str, tinker: Tinker):
    sampler, facts = tinker.sampler(), seeing.facts[family]
    pointer = {"type": "image_asset_pointer", "location": "http://127.0.0.1/x.png", "format": "png"}
    for chunk, field in (
        (image(facts, expected_tokens=2), "prompt.chunks[1].expected_tokens"),
        (pointer, "prompt.chunks[1].location"),
        ({"type": "dmel", "dmel": "aGk="}, "prompt.chunks[1]"),
    ):
        response = tinker.sample(sampler, [text(TEXT), chunk])
        assert response.status_code == 400, response.text
        assert field in response.text
    # The number of tokens need not be said.
    answer = tinker.sample(sampler, [text(TEXT), image(facts, format="png"), text([45])])
    message = schema.SampleResponse()
    message.ParseFromString(tinker.answer(ok(answer)).content)
    assert len(message.sequences[0].tokens) == 3 * 4


def test_tinkers_training(tinker: Tinker):
    model = tinker.model()

    def expect_another(chunk: Any) -> None:
        chunk.expected_tokens = tinker.num_tokens + 1

    def resize(chunk: Any) -> None:
        chunk.override_dimensions.width = 8

    for change, field in ((expect_another, "expected_tokens"), (resize, "override_dimensions")):
        # It has its place among the model's operations, whose outcome says what was wrong.
        refused = tinker.result(ok(tinker.train(model, change)))
        assert f"data[0].model_input.chunks[1].{field}" in refused["error"]
        assert refused["category"] == "user"
