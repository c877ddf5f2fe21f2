"""The place of an operation, found in a body that comes in parts and is broken somewhere."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfloop.server.shared.refusals import JsonPlace, Place
from selfloop.server.tinker import schema

JSON = st.recursive(
    st.none() | st.integers() | st.text() | st.sampled_from(['"seq_id": 5', "\\", "model_id", '\\"', "]}"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["seq_id", "model_id"]), inner, max_size=3)
    ),
    max_leaves=10,
)


def found(*parts: bytes) -> Place:
    finder = JsonPlace()
    for part in parts:
        finder.feed(part)
    finder.feed(b"", is_last=True)
    return finder.place


@given(before=JSON, after=JSON, seq=st.integers(0, 2**62), size=st.integers(1, 700), indent=st.none() | st.just(2))
def test_found_among_anything_in_parts_of_any_size(
    before: object, after: object, seq: int, size: int, indent: int | None
) -> None:
    text = json.dumps({"a": before, "seq_id": seq, "b": after, "model_id": "m:train:0", "c": before}, indent=indent)
    for body in (text.encode(), text.encode() + b"]]]]", json.dumps(json.loads(text), ensure_ascii=False).encode()):
        parts = [body[at : at + size] for at in range(0, len(body), size)]
        assert found(*parts) == Place(seq, "m:train:0")


@pytest.mark.parametrize("size", [1, 7, 300, 100_000])
def test_a_long_string_full_of_escapes(size: int) -> None:
    body = b'{"x": "' + rb"\\\"" * 3000 + b'\xff", "seq_id": 3}'
    assert found(*(body[at : at + size] for at in range(0, len(body), size))) == Place(3)


def test_a_number_in_quotes_is_plain_enough() -> None:
    assert found(b'{"seq_id": "3"}') == Place(3)


NONE = (b"", b"[]", b"\xff" * 1000, b'{"a": {"seq_id": 3}}', b'[{"seq_id": 3}]', b'{"seq_id": 3.5}')


@pytest.mark.parametrize("body", NONE)
def test_no_place(body: bytes) -> None:
    assert found(body) == Place()


def test_protobuf_up_to_where_it_breaks() -> None:
    good: bytes = schema.ForwardBackwardRequest(model_id="m", seq_id=7).SerializeToString()
    assert schema.place_in(good) == schema.place_in(good + b"\x1a\x7f") == Place(7, "m")
    assert schema.place_in(b"\xff" * 30) == Place()
