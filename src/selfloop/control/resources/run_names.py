"""What a run is called in lists."""

from collections.abc import Mapping

from selfloop.control.resources.sessions import details_of
from selfloop.types.resources import Session

_MAX_CHARACTERS = 255
# What scripts write of themselves in their metadata; the second is the Tinker cookbook's.
_NAMES = ("name", "recipe_name", "recipe")


def run_name(given: str | None, metadata: Mapping[str, str] | None, session: Session, base_model: str) -> str:
    """The name that was given; else what the run, or its session, says of itself; else its base model's."""
    details = details_of(session)
    known = (given, _named(metadata), details.display_name, _named(details.user_metadata))
    return next((name[:_MAX_CHARACTERS] for name in known if name), base_model)


def _named(metadata: Mapping[str, str] | None) -> str | None:
    return next((metadata[name] for name in _NAMES if metadata and metadata.get(name)), None)
