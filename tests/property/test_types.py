"""Checkpoint URIs and tensors: what goes in comes out, and nothing else gets in."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfloop.types.datum import Tensor
from selfloop.types.errors import BadRequest
from selfloop.types.ids import RunId, new_id
from selfloop.types.status import CheckpointTarget
from selfloop.types.uris import CheckpointUri, is_checkpoint_name, parse_checkpoint_uri

names = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
run_ids = st.from_regex(r"\A[a-z0-9]{1,32}\Z")


@given(run_ids, st.sampled_from([CheckpointTarget.TRAINER, CheckpointTarget.SAMPLER]), names)
def test_a_uri_survives_the_round_trip(run_id: str, target: CheckpointTarget, name: str) -> None:
    uri = CheckpointUri(RunId(run_id), target, name)
    assert parse_checkpoint_uri(str(uri)) == uri


@given(st.text() | run_ids.map(lambda id: f"bt://loops:{id}/weights/") | names.map(lambda n: f"bt://x/weights/{n}"))
def test_any_other_text_is_refused_by_field(text: str) -> None:
    with pytest.raises(BadRequest, match=r"^path: "):
        parse_checkpoint_uri(text, "path")


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a\\b", "a b", "a\n", "-a", "x" * 129, "ä"])
def test_names_that_could_leave_their_folder_are_refused(name: str) -> None:
    assert not is_checkpoint_name(name)
    with pytest.raises(BadRequest):
        parse_checkpoint_uri(f"bt://loops:abc/weights/{name}")


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_integers_are_exact(values: list[int]) -> None:
    tensor = Tensor.of(values, "int64")
    assert tensor.shape == (len(values),)
    assert tensor.num_elements == len(values)
    assert list(tensor.values()) == values


@given(st.lists(st.floats(width=32)))
def test_floats_are_exact_in_float32(values: list[float]) -> None:
    got = list(Tensor.of(values, "float32").values())
    assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(got, values, strict=True))


def test_ids_are_short_and_differ() -> None:
    ids = {new_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(len(id) == 7 and id.isascii() and id.isalnum() and id == id.lower() for id in ids)
