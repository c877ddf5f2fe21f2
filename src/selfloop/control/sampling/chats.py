"""Conversations with their images, before and after the model's chat template has written them."""

from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from selfloop.types.images import Image
from selfloop.types.vision import TextOnly, VisionFacts
from selfloop.worker.protocol import RenderedChat


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation for the chat template: JSON of its messages, tools and further variables.

    ``images`` are those of its parts ``{"type": "image"}``, in their order; where they start is known once it is
    rendered.
    """

    messages: bytes
    tools: bytes | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    options: bytes | None = None
    images: list[Image] = field(default_factory=list[Image])


class ChatFacts(NamedTuple):
    """What the conversations of a model may be: ``template`` is the text of its chat template, None if it has none."""

    template: str | None
    vision: VisionFacts | TextOnly


class Prompt(NamedTuple):
    """Tokens, the placeholders of images among them, and the images."""

    tokens: list[int]
    images: list[Image]


def placed(rendered: RenderedChat, images: list[Image]) -> Prompt:
    """The one placeholder of each image becomes as many as the image is tokens."""
    tokens: list[int] = []
    found: list[Image] = []
    done = 0
    for at, image in zip(rendered.images, images, strict=True):
        tokens += rendered.tokens[done:at]
        found.append(msgspec.structs.replace(image, start=len(tokens)))
        tokens += [rendered.tokens[at]] * image.num_tokens
        done = at + 1
    return Prompt(tokens + rendered.tokens[done:], found)
