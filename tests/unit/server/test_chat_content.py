"""Texts and images of a message as chat templates read them, and data URLs."""

import base64

import pytest

import seeing_models
from selfloop.server.shared.chat_content import Content, with_image, with_text
from selfloop.server.shared.images import ImageReader
from selfloop.types.errors import BadRequest
from selfloop.types.vision import FixedSize, Marks, TextOnly, VisionFacts

SEEING = VisionFacts("gemma3", 7, FixedSize(8, 8, 4), 2, 1 / 255, (0.5,), (0.5,), Marks(5, 5, 6, "\n\n"))
PNG = seeing_models.encoded(seeing_models.picture(1))
JPEG = seeing_models.encoded(seeing_models.picture(1), "jpeg")
IMAGE = {"type": "image"}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a"], "a"),
        (["a", "b"], "a\nb"),
        ([None], [IMAGE]),
        (["a", None], [text("a"), IMAGE]),
        (["a", "b", None, "c", "d", None, None], [text("a\nb"), IMAGE, text("c\nd"), IMAGE, IMAGE]),
        (["", None, ""], [text(""), IMAGE, text("")]),
    ],
)
def test_texts_are_joined_and_images_stand_alone(given: list[str | None], expected: Content):
    content = None
    for part in given:
        content = with_image(content) if part is None else with_text(content, part)
    assert content == expected


@pytest.mark.parametrize(
    ("head", "data", "format"),
    [
        ("data:image/png;base64,", PNG, "png"),
        ("DATA:Image/PNG;Base64,", PNG, "png"),
        ("data:image/jpeg;base64,", JPEG, "jpeg"),
        ("data:image/jpg;base64,", JPEG, "jpeg"),
    ],
)
def test_data_urls(head: str, data: bytes, format: str):
    image = ImageReader(SEEING).from_data_url(head + base64.b64encode(data).decode(), "url")
    assert (image.data, image.format, image.num_tokens, image.field) == (data, format, 4, "url")


@pytest.mark.parametrize(
    "url",
    ["", "data:", "data:,", "data:;base64,", "data:image/png;charset=utf-8;base64,AAAA", "data:image/png", "x" * 300],
)
def test_other_urls_are_refused(url: str):
    with pytest.raises(BadRequest) as refused:
        ImageReader(SEEING).from_data_url(url, "url")
    assert refused.value.field == "url"
    assert len(refused.value.expected) < 300


def test_a_model_of_text_says_why():
    with pytest.raises(BadRequest, match=r"url: text: the served model takes text only \(because\)"):
        ImageReader(TextOnly("because")).from_data_url("data:image/png;base64," + base64.b64encode(PNG).decode(), "url")
