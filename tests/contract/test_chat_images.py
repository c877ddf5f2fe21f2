"""Images in conversations: the official ``openai`` and ``anthropic`` clients, and what is refused by field."""

import base64
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
from anthropic import Anthropic
from openai import OpenAI

import seeing_models
from gateway import KEY, Json, Run, create_run, ok
from seeing_gateway import SeeingGateway
from seeing_models import IMAGE_TOKEN, MARKS, encoded, picture
from selfloop.types.images import MAX_IMAGES

PNG = encoded(picture(1, 70, 40))
OTHER = encoded(picture(3, 70, 40))
JPEG = encoded(picture(2, 30, 61), "jpeg")
QUESTION = "What do you see in this picture, in a word?"
NUM_NEW = 6
GREEDY: Json = {"max_tokens": NUM_NEW, "temperature": 0.0}


class Served(NamedTuple):
    """A model that sees, and the clients of the whole server."""

    family: str
    seeing: SeeingGateway
    openai: OpenAI
    anthropic: Anthropic

    @property
    def model(self) -> str:
        return f"tiny/{self.family}"

    @property
    def http(self) -> httpx.Client:
        return self.seeing.http

    def chat(self, *parts: Json | str, **fields: Any) -> Any:
        asked = GREEDY | {"extra_body": {"return_token_ids": True}} | fields
        return self.openai.chat.completions.create(model=self.model, messages=question(*parts), **asked)


@pytest.fixture(scope="module", params=seeing_models.FAMILIES)
def served(request: pytest.FixtureRequest, seeing: SeeingGateway) -> Iterator[Served]:
    options: Any = {"api_key": KEY, "max_retries": 0, "timeout": 60}
    with (
        OpenAI(base_url=f"{seeing.gateway.url}/oai/api/v1", **options) as openai,
        Anthropic(base_url=f"{seeing.gateway.url}/anthropic/api", **options) as anthropic,
    ):
        yield Served(request.param, seeing, openai, anthropic)


def url_of(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def part(data: bytes = PNG, media_type: str = "image/png", **other: str) -> Json:
    return {"type": "image_url", "image_url": {"url": url_of(data, media_type)} | other}


def block(data: bytes = PNG, media_type: str = "image/png") -> Json:
    source = {"type": "base64", "media_type": media_type, "data": base64.b64encode(data).decode()}
    return {"type": "image", "source": source}


def question(*parts: Json | str) -> Any:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def chunks_of(prompt: list[int], *files: tuple[bytes, str]) -> list[Json]:
    """The prompt as a Loops client would send it: text, and each image in place of its tokens."""
    chunks: list[Json] = []
    left = list(files)
    for text, places in re.findall(r"((?:\b(?!IMAGE)\w+ )*)((?:IMAGE )*)", named(prompt)):
        if text:
            chunks.append({"type": "encoded_text", "tokens": [int(token) for token in text.split()]})
        if places:
            data, format = left.pop(0)
            chunk = {"type": "image", "data": base64.b64encode(data).decode(), "format": format}
            chunks.append(chunk | {"expected_tokens": places.count("IMAGE")})
    assert not left
    return chunks


def named(prompt: list[int]) -> str:
    return "".join("IMAGE " if token == IMAGE_TOKEN else f"{token} " for token in prompt)


def test_what_is_sampled_is_what_a_loops_client_samples(served: Served):
    """By tokens, logprobs and usage, of a base model; the prompt's images go as chunks there."""
    answer = served.chat(part(), QUESTION, part(JPEG, "image/jpeg", detail="auto"), logprobs=True)
    prompt = answer.prompt_token_ids
    run = create_run(served.http, base_model=served.model)
    body = GREEDY | {"prompt": [], "logprobs": 0}
    body["model_input_chunks"] = chunks_of(prompt, (PNG, "png"), (JPEG, "jpeg"))
    theirs = ok(served.http.post(f"/loops/samplers/{run['sampler']['id']}/sample", json=body))
    assert theirs["choices"][0]["prompt_token_ids"] == prompt
    assert answer.usage.prompt_tokens == len(prompt) == theirs["usage"]["prompt_tokens"]
    assert answer.choices[0].token_ids == theirs["choices"][0]["token_ids"]
    logprobs = [entry.logprob for entry in answer.choices[0].logprobs.content]
    assert logprobs == pytest.approx(theirs["choices"][0]["logprobs"]["token_logprobs"], abs=1e-5)
    blind = served.chat(QUESTION)
    assert blind.usage.prompt_tokens < len(prompt) - prompt.count(IMAGE_TOKEN)


def test_every_route_gives_the_same_answer(served: Served):
    whole = served.chat(part(), QUESTION)
    text, num = whole.choices[0].message.content, whole.usage.prompt_tokens
    chunks = list(served.chat(part(), QUESTION, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].usage.prompt_tokens == num

    item = {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": url_of(PNG), "detail": "auto"},
            {"type": "input_text", "text": QUESTION},
        ],
    }
    asked: Any = {"model": served.model, "input": [item], "max_output_tokens": NUM_NEW, "temperature": 0.0}
    response = served.openai.responses.create(**asked)
    assert (response.output_text, response.usage.input_tokens) == (text, num)
    with served.openai.responses.stream(**asked) as events:
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text

    content = [block(), {"type": "text", "text": QUESTION}]
    prompt: Any = {"model": served.model, "messages": [{"role": "user", "content": content}]}
    greedy: Any = prompt | {"max_tokens": NUM_NEW, "extra_body": {"temperature": 0.0}}
    message = served.anthropic.messages.create(**greedy)
    assert "".join(block.text for block in message.content) == text
    assert message.usage.input_tokens + message.usage.cache_read_input_tokens == num
    with served.anthropic.messages.stream(**greedy) as stream:
        assert stream.get_final_text() == text
    assert served.anthropic.messages.count_tokens(**prompt).input_tokens == num
    tokenized = ok(served.http.post("/tokenize", json={"model": served.model, "messages": question(part(), QUESTION)}))
    assert tokenized["tokens"] == whole.prompt_token_ids


def test_a_tools_answer_may_be_an_image(served: Served):
    """As tools that look at a screen send it."""
    use = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
    said = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": [use]}]

    def count(*content: Json, **other: bool) -> int:
        result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": list(content)} | other
        asked: Any = [*said, {"role": "user", "content": [result]}]
        return served.anthropic.messages.count_tokens(model=served.model, messages=asked).input_tokens

    text = {"type": "text", "text": "A screen:"}
    num = served.chat(part()).prompt_token_ids.count(IMAGE_TOKEN)
    assert count(text, block()) >= count(text) + num
    assert count(text, block(), is_error=True) == count(text, block()) + len("Error: ")


def test_two_images_never_share_what_was_computed_of_one(served: Served):
    """Their tokens are the same ids; what is in the prefix cache is told apart by content."""

    def ask(data: bytes) -> Any:
        return served.chat("x" * 60, part(data), "y" * 60, QUESTION, logprobs=True)

    first, other, again = ask(PNG), ask(OTHER), ask(PNG)
    assert first.prompt_token_ids == other.prompt_token_ids
    at = first.prompt_token_ids.index(IMAGE_TOKEN)
    assert other.usage.prompt_tokens_details.cached_tokens <= at < again.usage.prompt_tokens_details.cached_tokens
    logprobs = [[entry.logprob for entry in one.choices[0].logprobs.content] for one in (first, other, again)]
    assert logprobs[0] != logprobs[1]
    assert logprobs[0] == pytest.approx(logprobs[2], abs=1e-5)


def test_words_are_no_image(served: Served):
    """What a template writes for an image, written by the user."""
    before, after, image = MARKS[served.family]
    words = f"{before}{image}{after}"
    alone = served.chat(words).prompt_token_ids
    assert alone.count(IMAGE_TOKEN) == 1
    num = served.chat(part()).prompt_token_ids.count(IMAGE_TOKEN)
    both = served.chat(words, part(), words)
    assert both.prompt_token_ids.count(IMAGE_TOKEN) == num + 2
    assert both.usage.prompt_tokens == len(both.prompt_token_ids)


def test_runs_and_checkpoints_see(served: Served):
    """A run's live adapter on its own route, and its checkpoint by name, answer as trained, and not as the base."""
    run = Run(served.http, create_run(served.http, base_model=served.model)).attached()
    prompt = served.chat(part(), QUESTION).prompt_token_ids
    answer = [50, 51, 52]
    chunks = [*chunks_of(prompt, (PNG, "png")), {"type": "encoded_text", "tokens": answer[:-1]}]
    targets = [-100] * (len(prompt) - 1) + answer
    inputs = {"target_tokens": {"data": targets, "dtype": "int64", "shape": [len(targets)]}}
    for _ in range(15):
        run.forward_backward([{"model_input": {"chunks": chunks}, "loss_fn_inputs": inputs}])
        run.step(0.02)
    run.save("seen", "save_weights_for_sampler")
    asked: Any = {"messages": question(part(), QUESTION), "max_tokens": 3, "temperature": 0.0}
    asked["extra_body"] = {"return_token_ids": True}
    checkpoint = f"tinker://{run.id}/sampler_weights/seen"
    of_checkpoint = served.openai.chat.completions.create(model=checkpoint, **asked)
    assert of_checkpoint.choices[0].token_ids == answer
    with OpenAI(base_url=f"{run.resource['sampler']['base_url']}/v1", api_key=KEY, max_retries=0, timeout=60) as own:
        live = own.chat.completions.create(model=served.model, **asked)
    assert live.choices[0].token_ids == answer
    base = served.openai.chat.completions.create(model=served.model, **asked)
    assert base.choices[0].token_ids != answer


# -- refused ----------------------------------------------------------------------------------------------


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, pixels: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


AT = PNG.find(b"IDAT") + 10
# File, media type, and what is said of it.
FILES: dict[str, tuple[bytes, str, str]] = {
    "too many pixels": (_png(60_000, 60_000, zlib.compress(bytes(9))), "image/png", "pixels"),
    "cut off": (PNG[:-30], "image/png", "cut off"),
    "animated": (
        encoded(picture(1), save_all=True, append_images=[picture(2)]),
        "image/png",
        "not animated",
    ),
    "a jpeg that is said to be a png": (JPEG, "image/png", "a png file, as it is said to be"),
    "a gif": (encoded(picture(1), "gif"), "image/png", "GIF"),
    "nothing": (b"", "image/png", "1 to"),
    # Whole by its structure: only a decoder finds it.
    "damaged": (PNG[:AT] + bytes(20) + PNG[AT + 20 :], "image/png", "that can be read"),
    "fewer pixels than its header says": (_png(48, 32, zlib.compress(bytes(9))), "image/png", "that can be read"),
}
BY_URL = {
    "https": ("https://127.0.0.1:1/secret.png", "no URL is fetched; got https:..."),
    "http": ("http://169.254.169.254/x", "no URL is fetched; got http:..."),
    "file": ("file:///etc/passwd", "no URL is fetched; got file:..."),
    "a name": ("picture.png", "no URL is fetched; got no URL"),
    "no base64": ("data:image/png,abc", "no URL is fetched; got data:image/png"),
    "another kind": ("data:image/gif;base64,R0lGODlh", "image/png or image/jpeg, got 'image/gif'"),
    "no base64 in it": ("data:image/png;base64,%%", "base64 of an image's file"),
}


def refused(response: httpx.Response, field: str, says: str) -> None:
    """A 400 in the dialect's own shape, whose message begins with the field."""
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error.get("param", field) == field
    assert field in error["message"]
    assert says in error["message"]
    assert "secret" not in error["message"]


def post_all(served: Served, url: str, source: Json) -> list[tuple[httpx.Response, str]]:
    """One image behind another in the three dialects, streamed and not, and the field that it is in."""
    found = []
    for stream in (False, True):
        common = {"model": served.model, "stream": stream}
        chat = common | GREEDY | {"messages": question(part(), {"type": "image_url", "image_url": {"url": url}})}
        field = "messages[0].content[1].image_url.url"
        found.append((served.http.post("/oai/api/v1/chat/completions", json=chat), field))
        content = [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": url}]
        items = common | {"input": [{"role": "user", "content": content}], "max_output_tokens": 3}
        found.append((served.http.post("/v1/responses", json=items), "input[0].content[1].image_url"))
        blocks = [{"type": "text", "text": "a"}, {"type": "image", "source": source}]
        messages = common | {"messages": [{"role": "user", "content": blocks}], "max_tokens": 3}
        field = "messages[0].content[1].source"
        found.append((served.http.post("/anthropic/api/v1/messages", json=messages), field))
    return found


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_refused(served: Served, case: str):
    data, media_type, says = FILES[case]
    for response, field in post_all(served, url_of(data, media_type), block(data, media_type)["source"]):
        refused(response, f"{field}.data" if field.endswith("source") else field, says)


@pytest.mark.parametrize("case", BY_URL)
def test_no_url_is_fetched(served: Served, case: str):
    url, says = BY_URL[case]
    source = {"type": "url", "url": url}
    for response, field in post_all(served, url, source):
        if field.endswith("source"):
            refused(response, f"{field}.type", "no URL is fetched, and no file is kept")
        else:
            refused(response, field, says)


def test_other_parts_are_refused_by_name(served: Served):
    for given, field, says in (
        (part(detail="low"), "messages[0].content[0].image_url.detail", 'null or "auto"'),
        (part() | {"surprise": 1}, "messages[0].content[0].surprise", "unknown"),
        ({"type": "image_url"}, "messages[0].content[0].image_url", "missing"),
        ({"type": "input_audio"}, "messages[0].content[0]", "a part of type text or image_url"),
    ):
        body = {"model": served.model, "messages": question(given)}
        refused(served.http.post("/oai/api/v1/chat/completions", json=body), field, says)
    for given, field, says in (
        (block(media_type="image/gif"), "source.media_type", "image/png or image/jpeg"),
        (block() | {"transformations": {"a": 1}}, "transformations", "not served"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "source.type", "no file is kept"),
    ):
        body = {"model": served.model, "max_tokens": 3, "messages": question(given)}
        response = served.http.post("/anthropic/api/v1/messages", json=body)
        refused(response, f"messages[0].content[0].{field}", says)
    item = {"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}
    response = served.http.post("/v1/responses", json={"model": served.model, "input": [item]})
    refused(response, "input[0].content[0].file_id", "null: files are not kept")


def test_too_many_images_are_refused(served: Served):
    body = {"model": served.model, "messages": question(*[part(encoded(picture(1, 8, 8)))] * (MAX_IMAGES + 1))}
    response = served.http.post("/oai/api/v1/chat/completions", json=body)
    refused(response, f"messages[0].content[{MAX_IMAGES}].image_url.url", f"at most {MAX_IMAGES} images")


def test_images_beyond_the_models_length_are_refused(served: Served):
    num = 512 // served.chat(part()).prompt_token_ids.count(IMAGE_TOKEN) + 1
    body = {"model": served.model, "messages": question(*[part()] * num)}
    refused(served.http.post("/oai/api/v1/chat/completions", json=body), "messages", "at most 511 tokens")
