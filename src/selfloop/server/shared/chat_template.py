"""What is read of a chat template's text, which the worker alone runs."""

import re


def has_variable(template: str | None, name: str) -> bool:
    """Whether a template names a variable; a model without a template has none."""
    return template is not None and re.search(rf"\b{name}\b", template) is not None
