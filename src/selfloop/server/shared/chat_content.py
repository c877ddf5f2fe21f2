"""A message's content as chat templates read it: one string, or parts where there are images.

Texts that follow one another are one, joined by a line break; around an image the template writes what it wants.
"""

Content = str | list[dict[str, str]]


def with_text(content: Content | None, text: str) -> Content:
    """``content``, None where it begins, and ``text`` behind it."""
    if content is None:
        return text
    if isinstance(content, str):
        return f"{content}\n{text}"
    *before, last = content
    if last["type"] == "text":
        return [*before, _part(f"{last['text']}\n{text}")]
    return [*content, _part(text)]


def with_image(content: Content | None) -> Content:
    """``content``, None where it begins, and an image behind it."""
    before = [_part(content)] if isinstance(content, str) else content or []
    return [*before, {"type": "image"}]


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}
