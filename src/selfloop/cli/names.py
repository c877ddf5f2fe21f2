"""The ids and addresses that clients print, in every form, as the server's own."""

import re

from selfloop.cli import remote
from selfloop.server.shared import tinker_paths
from selfloop.types.errors import BadRequest, NotFound
from selfloop.types.ids import is_id

FORMS_OF_A_RUN = "abc1234, abc1234:train:0, or the address of anything that it saved"
FORMS_OF_A_CHECKPOINT = "an id, or a path: bt://loops:... or tinker://..."

_ADDRESS = re.compile(r"(?:bt://loops:|tinker://)([^/]+)(?:/.*)?")


def run_id(text: str) -> str:
    """The run that ``text`` names: an id of either client, or the address of a checkpoint that the run saved."""
    address = _ADDRESS.fullmatch(text)
    named = address[1] if address else text
    try:
        return tinker_paths.run_id(named)
    except NotFound:
        return named


def sampler_id(text: str) -> str:
    """The sampler that ``text`` names: an id of either client."""
    try:
        return tinker_paths.sampler_id(text)
    except NotFound:
        return text


def checkpoint(text: str) -> str:
    """The checkpoint's ``bt://`` path; an id stays as it is.

    Raises:
        CommandFailed: an address of no known form.
    """
    if not text.startswith("tinker://"):
        return text
    try:
        return tinker_paths.our_path(text, "checkpoint")
    except (BadRequest, NotFound) as error:
        raise remote.CommandFailed(str(error)) from None


def find_checkpoint(server: remote.Server, text: str) -> remote.Json | None:
    """The checkpoint that ``text`` names by a path or an id.

    Raises:
        CommandFailed: a path of no known form, or of nothing that is there.
    """
    if not (tinker_paths.is_path(text) or is_id(text)):
        return None
    found = server.find("/v1/loops/checkpoints", checkpoint_path=checkpoint(text))
    if found is not None:
        return found["checkpoints"][0]
    if tinker_paths.is_path(text):
        raise remote.CommandFailed(f"checkpoint {text!r} not found; `selfloop checkpoints` lists them")
    return None


def find_run(server: remote.Server, text: str) -> remote.Json | None:
    """The run that ``text`` names, None when the server has none such."""
    found = server.find(f"/v1/loops/runs/{remote.segment(run_id(text))}")
    return None if found is None else found["run"]


def find_sampler(server: remote.Server, text: str) -> remote.Json | None:
    """The sampler that ``text`` names: by its id, or by its model or deployment in a client's answers."""
    found = server.find(f"/v1/loops/samplers/{remote.segment(sampler_id(text))}")
    if found is not None:
        return found["sampler"]
    rows: list[remote.Json] = server.rows("/v1/loops/samplers", "samplers", scope="org")
    mine = [row for row in rows if text in (row["model_id"], row["deployment_id"])]
    live = [row for row in mine if row["status"]["name"] != "INACTIVE"]
    return next(iter([*live, *mine]), None)


def sampler(server: remote.Server, text: str) -> remote.Json:
    """As :func:`find_sampler`. Raises :class:`CommandFailed` when there is none."""
    found = find_sampler(server, text)
    if found is None:
        raise remote.CommandFailed(f"sampler {text!r} not found; `selfloop samplers` lists them")
    return found
