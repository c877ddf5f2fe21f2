"""The gated delta rule: its formula in float64, transformers' own layer, and the ways in which rows come to it."""

from collections.abc import Collection, Iterator

import pytest
import torch
from torch.nn import functional as F
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from selfloop.engine.backends.base import CacheSlot, Varlen
from selfloop.engine.backends.torch.blocks.gated_delta_net import GatedDeltaNetBlock, build
from selfloop.engine.backends.torch.delta_rule import CHUNK, DeltaInputs, delta_rule, delta_step
from selfloop.engine.backends.torch.linear import FrozenLinear
from selfloop.engine.backends.torch.places import Places
from selfloop.engine.backends.torch.recurrence import (
    PackedRecurrence,
    PrefillRecurrence,
    Recurrence,
    RecurrentStates,
    StepRecurrence,
    packed_recurrence,
)
from selfloop.engine.models.gated_delta_net import GatedDeltaNet

CPU = torch.device("cpu")
SPEC = GatedDeltaNet(hidden_size=24, num_key_heads=2, num_value_heads=4, key_dim=8, value_dim=6, kernel=4, eps=1e-6)
# Shorter than the convolution, of one chunk and of several, and more of them than are computed at once.
LENGTHS = [1, 2, 70, 5, 2 * CHUNK, 64, *[3] * 14]


def _inputs(num: int, dtype: torch.dtype = torch.float32) -> DeltaInputs:
    heads, generator = SPEC.num_value_heads, torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(num, heads, *shape, generator=generator, dtype=torch.float64)

    q, k = (F.normalize(noise(SPEC.key_dim), dim=-1) for _ in range(2))
    made = (q * SPEC.key_dim**-0.5, k, noise(SPEC.value_dim), -noise().exp(), noise().sigmoid())
    return DeltaInputs(*(x.to(dtype).requires_grad_() for x in made))


def _token_by_token(x: DeltaInputs, lengths: list[int]) -> torch.Tensor:
    """The recurrence as it is written."""
    out, at = [], 0
    for length in lengths:
        state = torch.zeros(SPEC.num_value_heads, SPEC.key_dim, SPEC.value_dim, dtype=torch.float64)
        for t in range(at, at + length):
            state = state * x.g_NH[t].exp()[:, None, None]
            known = torch.einsum("hkv,hk->hv", state, x.k_NHk[t])
            change = x.rate_NH[t][:, None] * (x.v_NHv[t] - known)
            state = state + x.k_NHk[t][:, :, None] * change[:, None]
            out.append(torch.einsum("hkv,hk->hv", state, x.q_NHk[t]))
        at += length
    return torch.stack(out)


def test_chunks_are_the_recurrence_and_so_are_their_gradients():
    ours, exact = _inputs(sum(LENGTHS)), _inputs(sum(LENGTHS), torch.float64)
    found, expected = delta_rule(ours, LENGTHS), _token_by_token(exact, LENGTHS)
    torch.testing.assert_close(found, expected.float(), atol=1e-5, rtol=1e-4)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    grads = torch.autograd.grad((found * slope).sum(), list(ours))
    exact_grads = torch.autograd.grad((expected * slope.double()).sum(), list(exact))
    for name, grad, exact_grad in zip(DeltaInputs._fields, grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, exact_grad.float(), atol=2e-5, rtol=1e-3, msg=name)


@torch.no_grad()
def test_a_sequence_goes_on_from_its_state():
    x, lengths, first = _inputs(sum(LENGTHS)), LENGTHS, [max(1, length // 2) for length in LENGTHS]
    whole = delta_rule(x, lengths).split(lengths)
    states = torch.zeros(len(lengths), SPEC.num_value_heads, SPEC.key_dim, SPEC.value_dim)
    parts = list(zip(*(tensor.split(lengths) for tensor in x), strict=True))
    begun = DeltaInputs(*(torch.cat([p[i][:n] for p, n in zip(parts, first, strict=True)]) for i in range(5)))
    before = delta_rule(begun, first, states).split(first)
    for index, (part, num) in enumerate(zip(parts, first, strict=True)):
        torch.testing.assert_close(before[index], whole[index][:num], atol=1e-6, rtol=1e-4)
        for t in range(num, lengths[index]):
            out, states[index : index + 1] = delta_step(
                DeltaInputs(*(tensor[t : t + 1] for tensor in part)), states[index : index + 1]
            )
            torch.testing.assert_close(out[0], whole[index][t], atol=2e-6, rtol=1e-4)


class _Weights:
    def __init__(self, layer: Qwen3_5GatedDeltaNet) -> None:
        self._tensors = {f"linear_attn.{name}": tensor for name, tensor in layer.state_dict().items()}

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def read(self, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, self._tensors[name]) for name in names)


class _Pass:
    """A layer of its own, without adapters."""

    place = 0

    def __init__(self, recurrence: Recurrence) -> None:
        self.recurrence = recurrence

    def project(self, group: int, linear: FrozenLinear, x_TI: torch.Tensor) -> torch.Tensor:
        return F.linear(x_TI, linear.plain())


@pytest.fixture(scope="module")
def theirs() -> Qwen3_5GatedDeltaNet:
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        hidden_size=SPEC.hidden_size,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
        linear_num_key_heads=SPEC.num_key_heads,
        linear_num_value_heads=SPEC.num_value_heads,
        linear_key_head_dim=SPEC.key_dim,
        linear_value_head_dim=SPEC.value_dim,
        linear_conv_kernel_dim=SPEC.kernel,
        rms_norm_eps=SPEC.eps,
    )
    layer = Qwen3_5GatedDeltaNet(config, 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return layer.requires_grad_(False)


@pytest.fixture(scope="module")
def ours(theirs: Qwen3_5GatedDeltaNet) -> GatedDeltaNetBlock:
    places = Places(CPU, torch.float32)
    block = build(SPEC, 0, places)
    source = _Weights(theirs)
    assert set(source.names()) == set(SPEC.tensors())
    places.fill(source)
    return block


def _rows(num: int) -> torch.Tensor:
    return torch.randn(num, SPEC.hidden_size, generator=torch.Generator().manual_seed(num))


@pytest.mark.parametrize("blocks", [None, [73, sum(LENGTHS) - 73]])
def test_packed_sequences_are_those_of_transformers_alone(
    theirs: Qwen3_5GatedDeltaNet, ours: GatedDeltaNetBlock, blocks: list[int] | None
):
    x_TD = _rows(sum(LENGTHS)).requires_grad_()
    found = ours(x_TD, _Pass(packed_recurrence(LENGTHS, blocks)))
    expected = torch.cat([theirs(part[None])[0] for part in x_TD.split(LENGTHS)])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    slope = _rows(sum(LENGTHS) + 1)[1:]
    grads = [torch.autograd.grad((y * slope).sum(), x_TD)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_parts_of_prompts_and_steps_are_the_whole(ours: GatedDeltaNetBlock):
    """Two prompts in parts of unlike lengths; the first one's sample is forked, and both grow on."""
    states = RecurrentStates([SPEC], CPU)
    lengths, cuts = [40, 90], [[0, 2, 3, 31], [0, 64, 66, 80]]
    tokens = [_rows(length) for length in lengths]
    whole = [ours(x, _Pass(PackedRecurrence([len(x)]))) for x in tokens]
    slots = [CacheSlot([]), CacheSlot([])]
    for step in range(3):
        starts, stops = [cut[step] for cut in cuts], [cut[step + 1] for cut in cuts]
        sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
        x_TD = torch.cat([x[a:b] for x, a, b in zip(tokens, starts, stops, strict=True)])
        batch = Varlen(torch.zeros(len(x_TD), dtype=torch.int64), sizes, starts, slots)
        found = ours(x_TD, _Pass(PrefillRecurrence(states, batch))).split(sizes)
        for y, expected, a, b in zip(found, whole, starts, stops, strict=True):
            torch.testing.assert_close(y, expected[a:b], atol=1e-5, rtol=1e-4)
    forked = CacheSlot([])
    states.fork(slots[0], forked)
    states.leave(slots[0])
    for step in range(9):
        starts = [31 + step, 80 + step]
        x_BD = torch.stack([x[at] for x, at in zip(tokens, starts, strict=True)])
        batch = Varlen(torch.zeros(2, dtype=torch.int64), [1, 1], starts, [forked, slots[1]])
        found = ours.step(x_BD, _Pass(StepRecurrence(states, batch)))
        for y, expected, at in zip(found, whole, starts, strict=True):
            torch.testing.assert_close(y, expected[at], atol=1e-5, rtol=1e-4)


def test_a_new_sequence_in_a_row_of_another_begins_with_nothing():
    states = RecurrentStates([SPEC], CPU)
    slot, batch = CacheSlot([]), Varlen(torch.zeros(3, dtype=torch.int64), [3], [0], [])
    rows = states.rows([slot], [0])
    states.put_delta(0, rows, torch.ones(1, SPEC.num_value_heads, SPEC.key_dim, SPEC.value_dim))
    states.put_tail(0, rows, torch.ones(1, SPEC.kernel - 1, SPEC.mixed_size))
    states.leave(slot)
    other = CacheSlot([])
    again = states.rows([other], batch.starts)
    assert torch.equal(rows, again), "a row that is free is taken first"
    assert not states.delta(0, again).any()
    assert not states.tail(0, again).any()
