"""Scored tokens: any layout that is taken comes back as it was asked for."""

from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfloop.server.tinker import schema, wire
from selfloop.server.tinker.sampling.targets import read_targets
from selfloop.types.errors import BadRequest

VOCAB = 50
CELLS = st.lists(st.lists(st.integers(-1, VOCAB - 1), min_size=3, max_size=3), min_size=1, max_size=8)


@given(CELLS)
def test_both_layouts_name_the_same_cells(cells: list[list[int]]):
    num_rows = len(cells)
    flat = [token for row in cells for token in row]
    if not any(token >= 0 for token in flat):
        with pytest.raises(BadRequest, match="at least one"):
            read_targets(wire.TargetTokens(data=flat, dtype="int64", shape=[num_rows, 3]), num_rows + 1, VOCAB)
        return
    dense = read_targets(wire.TargetTokens(data=flat, dtype="int64", shape=[num_rows, 3]), num_rows + 1, VOCAB)
    named = [[(column, token) for column, token in enumerate(row) if token >= 0] for row in cells]
    crow = [sum(map(len, named[:i])) for i in range(num_rows + 1)]
    columns = [column for row in named for column, _ in row]
    tokens = [token for row in named for _, token in row]
    tensor = wire.TargetTokens(
        data=tokens,
        dtype="int64",
        shape=[num_rows, 3],
        sparse_crow_indices=crow,
        sparse_col_indices=columns,
    )
    sparse = read_targets(tensor, num_rows + 1, VOCAB)
    assert list(array("i", dense.cells.tokens)) == flat
    assert list(array("i", sparse.cells.tokens)) == tokens
    assert list(array("q", sparse.cells.rows)) == crow

    values = array("f", [-float(token) for token in tokens]).tobytes()
    message = schema.SampleResponse().target_prompt_logprobs
    sparse.fill(message, values)
    assert message.sparse_csr.values == values
    assert list(array("q", message.sparse_csr.crow_indices)) == crow
    assert list(array("q", message.sparse_csr.col_indices)) == columns
    assert list(message.shape) == [num_rows, 3]


NUMBERS = st.lists(st.integers(-3, VOCAB + 3), max_size=6)


@given(
    st.fixed_dictionaries(
        {"data": NUMBERS, "dtype": st.sampled_from(["int64", "float32"])},
        optional={"shape": NUMBERS, "sparse_crow_indices": NUMBERS, "sparse_col_indices": NUMBERS},
    )
)
def test_anything_else_is_refused_by_name(given_: dict[str, object]):
    tensor = msgspec.convert(given_, wire.TargetTokens)
    try:
        targets = read_targets(tensor, 3, VOCAB)
    except BadRequest as error:
        named = error.field
    else:
        named = None
    if named is not None:
        assert named.startswith("target_prompt_logprobs.")
        return
    rows = array("q", targets.cells.rows)
    assert list(rows) == sorted(rows)
    assert (rows[0], rows[-1], len(rows)) == (0, len(tensor.data), 3)
