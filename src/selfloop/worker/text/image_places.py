"""Where the images of a conversation are, in the text that its chat template writes.

A template writes a token for each image, and whoever sends text may write the same. So the names of these tokens are
taken out of the conversation before it is rendered: whatever is found afterwards is the template's own. The text that
takes its place is that of transformers' processors (``Gemma3Processor``, ``Qwen3VLProcessor``).
"""

import json
import re
from itertools import count
from typing import Any, NamedTuple

from selfloop.types.errors import BadRequest
from selfloop.types.model_tokenizer import ModelTokenizer
from selfloop.types.vision import VisionFacts
from selfloop.worker.protocol import RenderedChat

# Of characters that no text should have; those that it has are not used.
_NAME = re.compile("\ue000[0-9]+\ue001")


class Written(NamedTuple):
    """A conversation as its template wrote it, which is still to be tokenized.

    Args:
        placeholder: id of the token that stands for an image; None where there are no images.
        is_image: of each placeholder in the text, whether it is an image's, and not the sender's words.
    """

    text: str
    placeholder: int | None = None
    is_image: list[bool] = []

    def rendered(self, tokens: list[int]) -> RenderedChat:
        """With the token ids of the text. Raises :class:`BadRequest` where they do not have its placeholders."""
        if self.placeholder is None:
            return RenderedChat(tokens)
        found = [at for at, token in enumerate(tokens) if token == self.placeholder]
        if len(found) != len(self.is_image):
            raise BadRequest("messages", f"text that keeps the {len(self.is_image)} tokens of images whole")
        return RenderedChat(tokens, [at for at, is_image in zip(found, self.is_image, strict=True) if is_image])


class Hidden(NamedTuple):
    """A conversation's values without the names of tokens of images, and what they became of."""

    values: list[Any]
    names: dict[str, str]


class ImagePlaces:
    """Finds them, and writes what the model has been trained on around each.

    Args:
        vision: the tokens' ids.
        tokenizer: their names.
    """

    def __init__(self, vision: VisionFacts, tokenizer: ModelTokenizer) -> None:
        marks = vision.marks
        self._shown, self._placeholder, before, after = (
            "" if token is None else tokenizer.token_bytes(token).decode(errors="replace")
            for token in (marks.shown, vision.image_token_id, marks.before, marks.after)
        )
        self._token = vision.image_token_id
        self._instead = f"{marks.around}{before}{self._placeholder}{after}{marks.around}"

    def hide(self, values: list[Any]) -> Hidden:
        """``values`` are what JSON has."""
        if not self._shown or not self._placeholder:
            raise BadRequest("messages", "no images: the model's tokenizer lacks the tokens that stand for them")
        # A token that is a part of the other goes last.
        tokens = sorted({self._shown, self._placeholder}, key=len, reverse=True)
        taken = set(_NAME.findall(json.dumps(values, ensure_ascii=False)))
        free = (name for at in count() if (name := f"\ue000{at}\ue001") not in taken)
        names = dict(zip(tokens, free, strict=False))
        return Hidden([_replaced(value, names) for value in values], {name: token for token, name in names.items()})

    def write(self, text: str, hidden: Hidden, num_images: int) -> Written:
        """``text`` is what the template wrote of the hidden values.

        Raises:
            BadRequest: it did not write one token an image.
        """
        is_image: list[bool] = []

        def written(found: re.Match[str]) -> str:
            if found[0] == self._shown:
                is_image.append(True)
                return self._instead
            name = hidden.names.get(found[0], found[0])
            if name == self._placeholder:
                is_image.append(False)
            return name

        sought = [self._shown, self._placeholder, *hidden.names]
        text = re.sub("|".join(map(re.escape, sought)), written, text)
        if (num := sum(is_image)) != num_images:
            raise BadRequest(
                "messages",
                f"images where the model's chat template has a place for them: it wrote {num} of {num_images}",
            )
        return Written(text, self._token, is_image)


def _replaced(value: Any, names: dict[str, str]) -> Any:
    match value:
        case str():
            for old, new in names.items():
                value = value.replace(old, new)
            return value
        case list():
            return [_replaced(part, names) for part in value]
        case dict():
            return {_replaced(key, names): _replaced(part, names) for key, part in value.items()}
        case _:
            return value
