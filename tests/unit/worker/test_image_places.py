"""Images in the model's own chat template, against transformers' processors."""

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import seeing_models
from seeing_models import IMAGE_TOKEN, MARKS, encoded, picture
from selfloop.control.sampling.chats import Prompt, placed
from selfloop.engine.vision.pixels import pixel_values
from selfloop.types.errors import BadRequest
from selfloop.types.images import Image, read_size
from selfloop.types.model_tokenizer import ModelTokenizer
from selfloop.types.vision import VisionFacts
from selfloop.worker.images.pixels import PixelReader
from selfloop.worker.protocol import RenderChat
from selfloop.worker.text.chat import ChatTemplate

PICTURES = [picture(seed, *size) for seed, size in enumerate([(70, 40), (30, 61), (20, 20)])]
# Numbers are images.
CONVERSATIONS: dict[str, list[tuple[str, str | list[str | int]]]] = {
    "an image and a question": [("user", [0, "What is it?"])],
    "a question and an image": [("user", ["What is it? ", 1])],
    "between texts": [("user", ["One ", 0, "\n\n and é", 1, 2])],
    "later turns": [("system", "Be brief."), ("user", [0]), ("assistant", "A cat."), ("user", ["And", 2, "?"])],
}


class Seeing(NamedTuple):
    family: str
    folder: Path
    facts: VisionFacts
    template: ChatTemplate


@pytest.fixture(scope="module", params=seeing_models.FAMILIES)
def seeing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Seeing:
    folder = seeing_models.save(request.param, tmp_path_factory.mktemp("seeing") / "model")
    return Seeing(request.param, folder, seeing_models.facts(folder), loaded(folder))


def loaded(folder: Path) -> ChatTemplate:
    return ChatTemplate.load(folder, ModelTokenizer.load(folder))


def messages(conversation: list[tuple[str, Any]], image: Any) -> list[dict[str, Any]]:
    """``image`` makes a part of an image's number."""
    return [
        {
            "role": role,
            "content": content
            if isinstance(content, str)
            else [image(part) if isinstance(part, int) else {"type": "text", "text": part} for part in content],
        }
        for role, content in conversation
    ]


def rendered(seeing: Seeing, conversation: list[tuple[str, Any]], template: ChatTemplate | None = None) -> Prompt:
    """As a gateway has it done, of the images in PICTURES."""
    numbers = [part for _, content in conversation if not isinstance(content, str) for part in content]
    images = [image_of(seeing.facts, number) for number in numbers if isinstance(number, int)]
    body = json.dumps(messages(conversation, lambda _: {"type": "image"})).encode()
    return placed((template or seeing.template).tokens(RenderChat(body, num_images=len(images))), images)


def image_of(facts: VisionFacts, number: int) -> Image:
    data = encoded(PICTURES[number])
    return Image("image", 0, facts.sizing.num_tokens(read_size(data, "png", "image")), "png", data)


def expected(seeing: Seeing, conversation: list[tuple[str, Any]]) -> dict[str, Any]:
    processor = seeing_models.chat_processor(seeing.family, seeing.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = messages(conversation, lambda number: {"type": "image", "image": PICTURES[number]})
        return processor.apply_chat_template(
            asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_and_pixels_are_those_of_transformers(seeing: Seeing, name: str):
    found, theirs = rendered(seeing, CONVERSATIONS[name]), expected(seeing, CONVERSATIONS[name])
    assert found.tokens == theirs["input_ids"][0].tolist()
    at = [at for image in found.images for at in range(image.start, image.stop)]
    assert at == [at for at, token in enumerate(found.tokens) if token == IMAGE_TOKEN]
    read = PixelReader()
    pixels = []
    for image in found.images:
        size = seeing.facts.sizing.resized(read_size(image.data, image.format, "image"))
        pixels.append(pixel_values(read(image, size, seeing.facts.resample), size, seeing.facts))
    assert torch.equal(torch.cat(pixels), theirs["pixel_values"])


def test_words_are_no_images(seeing: Seeing):
    """Names of the tokens in a text are tokens as of any text, and no places of an image."""
    before, after, image = MARKS[seeing.family]
    words = f"{image}{before}{image}{after} \ue0000\ue001 {before}"
    with_words = rendered(seeing, [("user", [words, 0, words])])
    (found,) = with_words.images
    (alone,) = rendered(seeing, [("user", ["", 0, ""])]).images
    encode = ModelTokenizer.load(seeing.folder).encode
    num = len(encode(words, add_special_tokens=False))
    assert found.start == alone.start + num
    assert with_words.tokens[found.start - 1] == with_words.tokens[alone.start - 1 + num]
    assert with_words.tokens.count(IMAGE_TOKEN) == found.num_tokens + 4
    # A text alone is what it always was.
    text = [("user", words)]
    assert rendered(seeing, text) == (
        encode(f"<|im_start|>user\n{words}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False),
        [],
    )


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ messages[0]['role'] }}", "wrote 0 of 1"),
        ("{{ PLACE }}{{ PLACE }}", "wrote 2 of 1"),
        # Parts that are a token only once they stand together.
        ("{% for p in messages[0]['content'] %}{{ p['text'] if 'text' in p else PLACE }}{% endfor %}", "wrote 2 of 1"),
    ],
)
def test_a_template_that_writes_another_number_is_refused(seeing: Seeing, tmp_path: Path, template: str, says: str):
    shown = MARKS[seeing.family][0 if seeing.family == "gemma3" else 2]
    for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((seeing.folder / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(template.replace("PLACE", repr(shown)), encoding="utf-8")
    with pytest.raises(BadRequest, match=rf"messages: images where .*template.* {says}"):
        rendered(seeing, [("user", [shown[:5], shown[5:], 0])], loaded(tmp_path))


def test_a_tokenizer_without_their_tokens_is_refused(seeing: Seeing, tmp_path: Path):
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((seeing.folder / name).read_bytes())
    raw = json.loads((seeing.folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] not in MARKS[seeing.family]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(BadRequest, match="messages: no images: the model's tokenizer lacks"):
        rendered(seeing, [("user", [0])], loaded(tmp_path))
