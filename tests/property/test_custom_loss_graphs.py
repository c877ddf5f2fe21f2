"""Any graph at all: it is refused with a reason, or computed within its bounds; nothing else happens."""

import math

import msgspec
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfloop.engine.losses.custom import CustomLossRunner
from selfloop.types.custom_loss import CustomLoss, LossInput, Node, check
from selfloop.types.custom_loss_ops import OPERATIONS
from selfloop.types.errors import BadRequest, OperationFailed

NAMES = ["logprobs", "advantages", *(f"n{i}" for i in range(5))]
NUMBERS = st.integers(-3, 12) | st.sampled_from([0.5, -1.0, 2**40, 2**53, 2**64, 1e300])
WORDS = st.sampled_from(["shape", "dtype", "T", "mean", "fro", "__class__", "__globals__", "data", "x" * 100])
REFS = st.sampled_from(NAMES).map(lambda name: {"ref": name})
VALUES = st.recursive(
    REFS | NUMBERS | WORDS | st.booleans() | st.none() | st.sampled_from([{"ellipsis": True}, {"dtype": "float64"}]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(lambda items: {"tuple": items})
        | st.tuples(inner, inner, inner).map(lambda items: {"slice": list(items)})
        | st.dictionaries(st.sampled_from(["ref", "dict", "float", "code"]), inner, max_size=2)
    ),
    max_leaves=5,
)
TARGETS = st.sampled_from(sorted(OPERATIONS)) | st.sampled_from(["os.system", "builtins.eval", ".numpy", "torch.load"])


@st.composite
def graphs(draw: st.DrawFn) -> CustomLoss:
    nodes = [Node("placeholder", name, name) for name in NAMES[:2]]
    for name in NAMES[2 : draw(st.integers(2, len(NAMES)))]:
        target = draw(TARGETS)
        op = "call_method" if target.startswith(".") else "call_function"
        args = draw(st.lists(REFS | VALUES, min_size=1, max_size=3))
        known = {parameter.name for parameter in OPERATIONS[target].parameters} if target in OPERATIONS else {"x"}
        kwargs = draw(st.dictionaries(st.sampled_from(sorted(known)), VALUES, max_size=1))
        nodes.append(Node(op, name, target.removeprefix("."), args, kwargs))
    result = draw(st.just({"ref": nodes[-1].name}) | VALUES)
    total = [{"tuple": [result, {"dict": {"custom/x:sum": result}}]}] if draw(st.integers(0, 9)) else [draw(VALUES)]
    nodes.append(Node("output", "output", "output", total))
    return CustomLoss("f", [LossInput("logprobs", 1), LossInput("advantages", 1)], nodes)


@settings(max_examples=300)
@given(graphs())
def test_a_graph_is_refused_or_computed(loss: CustomLoss):
    refused: BadRequest | OperationFailed | None = None
    try:
        wire = msgspec.json.encode(loss)
        loss = msgspec.json.decode(wire, type=CustomLoss)
        check(loss)
        found = CustomLossRunner(loss).run(0, torch.linspace(-2, -1, 4), {"advantages": torch.ones(4)}, with_grad=True)
    except (BadRequest, OperationFailed) as error:
        refused = error
    if isinstance(refused, BadRequest):
        assert refused.field.startswith(("graph.", "loss_fn_config."))
        assert len(str(refused)) < 4000
    elif refused is not None:
        assert "not finite" in str(refused)
    else:
        assert math.isfinite(found.loss)
        assert found.grad is not None
        assert found.grad.shape == (4,)
