"""A model that sees no images takes none, nor routed experts one without experts: refused at once and in words."""

import httpx
import pytest

from gateway import Json, Run, datum, ok, words

IMAGE = {"type": "image", "data": "aGk=", "format": "png", "expected_tokens": 3}
TEXT = {"type": "encoded_text", "tokens": words(1)[:-1]}
ROUTED = {"uri": "bt://loops:aaaaaaa/sequences/x", "version": 1}


@pytest.fixture(scope="module")
def run(http: httpx.Client) -> Run:
    return Run.create(http).attached()


def refused(response: httpx.Response, *says: str) -> None:
    """Final to the client, with the field and the reason in the message."""
    assert response.status_code == 422, response.text
    for word in says:
        assert word in response.text, response.text


@pytest.mark.parametrize("op", ["forward", "forward_backward"])
@pytest.mark.parametrize(("chunks", "index"), [([IMAGE], 0), ([TEXT, IMAGE], 1), ([IMAGE, TEXT], 0)])
def test_an_image_in_a_datum(run: Run, op: str, chunks: list[Json], index: int):
    data = [datum(words(1)), datum(words(1)) | {"model_input": {"chunks": chunks}}]
    refused(run.post(op, data=data, loss_fn="cross_entropy"), f"data[1].model_input.chunks[{index}]", "text")


@pytest.mark.parametrize("op", ["forward", "forward_backward"])
def test_routed_experts_in_a_datum(run: Run, op: str):
    data = [datum(words(1)) | {"routed_experts_ref": ROUTED}]
    refused(run.post(op, data=data, loss_fn="cross_entropy"), "data[0].routed_experts_ref", "experts")


def test_images_and_routed_experts_in_a_sample(run: Run):
    sampler = f"/loops/samplers/{run.resource['sampler']['id']}"
    for chunks in ([IMAGE], [TEXT, IMAGE]):
        body = {"prompt": words(1), "max_tokens": 1, "model_input_chunks": chunks}
        refused(run.http.post(f"{sampler}/sample", json=body), "model_input_chunks", "text")
    body = {"prompt": words(1), "max_tokens": 1, "include_routed_experts": True}
    refused(run.http.post(f"{sampler}/sample", json=body), "include_routed_experts", "experts")
    # Asking for none is no request for them.
    body = {"prompt": words(1), "max_tokens": 1, "include_routed_experts": False}
    assert ok(run.http.post(f"{sampler}/sample", json=body))["choices"]
