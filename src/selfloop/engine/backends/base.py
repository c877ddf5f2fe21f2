"""What the engine asks of whoever computes a model: a backend loads it, a model computes, a cache remembers.

Outside ``backends/`` nobody asks which backend, kernel, device or layout it is. A backend says in words what it lacks,
and a model declares the contracts that it cannot keep; the engine then does without them.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from selfloop.engine.kv.pages import PagePool
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.models.spec import ModelSpec
from selfloop.engine.models.weights import TensorSource
from selfloop.engine.routing import Routing
from selfloop.engine.sample.penalties import Penalties
from selfloop.types.sampling import SamplingParams
from selfloop.types.settings import KeptAs


class Lacking(NamedTuple):
    """Why a backend does not compute a model; ``remedy`` is empty where nothing can be done about it."""

    reason: str
    remedy: str = ""


@dataclass(slots=True, eq=False, weakref_slot=True)
class CacheSlot:
    """A sequence's place in a cache.

    Args:
        pages: where its tokens lie, ``PAGE_TOKENS`` to a page; the pool's owner fills it in.
        grows: a sample, which takes a token at a time from here on: a cache may keep it where that is fast.
        num_in_pages: how many of its tokens, from the first on, the pages hold.
    """

    pages: list[int]
    grows: bool = False
    num_in_pages: int = 0


class ImageRows(NamedTuple):
    """Rows of a batch that are tokens of images.

    Args:
        rows_M: int64, which rows.
        features_MD: what stands in for their embeddings, unscaled.
        ahead: of each sequence, int64 for each of its rows: how many rows behind itself it sees, besides all before
            it; None where none sees any.
    """

    rows_M: Tensor
    features_MD: Tensor
    ahead: list[Tensor | None]


@dataclass(frozen=True, slots=True)
class Varlen:
    """Rows of several sequences, one after another and without padding: the batch of training, prefill and decode.

    Args:
        tokens_T: int64 ids, on the model's device.
        lengths: rows of each sequence.
        starts: the position of each sequence's first row; all 0 in training.
        slots: where each sequence's earlier tokens lie, which its rows here join; empty in training.
        routing: which experts the rows go to, of a model with the contract ``routes``; None leaves it to its routers.
        images: the rows that are no text; None where all are.
        rotary: int64 (T,) or (3, T), by what rows are rotated; None for their positions.
    """

    tokens_T: Tensor
    lengths: list[int]
    starts: list[int]
    slots: list[CacheSlot]
    routing: Routing | None = None
    images: ImageRows | None = None
    rotary: Tensor | None = None

    @classmethod
    def whole(
        cls,
        tokens_T: Tensor,
        lengths: list[int],
        routing: Routing | None = None,
        images: ImageRows | None = None,
        rotary: Tensor | None = None,
    ) -> "Varlen":
        """Whole sequences, with nothing before them."""
        return cls(tokens_T, lengths, [0] * len(lengths), [], routing, images, rotary)

    @property
    def stops(self) -> list[int]:
        """The position behind each sequence's last row."""
        return [start + length for start, length in zip(self.starts, self.lengths, strict=True)]

    @property
    def ahead(self) -> list[Tensor | None]:
        """Of :class:`ImageRows`, for every sequence."""
        return [None] * len(self.lengths) if self.images is None else self.images.ahead

    @property
    def rotary_positions(self) -> Tensor:
        """(T,) or (3, T), on the model's device."""
        return self.positions_T if self.rotary is None else self.rotary

    @property
    def positions_T(self) -> Tensor:
        """int64 position of each row in its own sequence, on the model's device."""
        if all(length == 1 for length in self.lengths):
            return torch.tensor(self.starts, device=self.tokens_T.device)
        parts = [torch.arange(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]
        return torch.cat(parts).to(self.tokens_T.device)


class Scores(NamedTuple):
    """Logprobs of targets, and of each row's likeliest tokens.

    Args:
        logprobs: float32 (N,) or (N, K), as the targets; carries the gradient.
        top_tokens_NJ: int64, the likeliest first; J is 0 when none were asked for.
        top_logprobs_NJ: float32.
    """

    logprobs: Tensor
    top_tokens_NJ: Tensor
    top_logprobs_NJ: Tensor


class Row(NamedTuple):
    """How to draw one row.

    Args:
        uniform: a number in [0, 1), the row's only randomness.
        mask_V: tokens that may be drawn, on the CPU; None for all.
        num_top: how many of the likeliest tokens to report.
        penalties: what is added to the logits first; None for nothing.
    """

    params: SamplingParams
    uniform: float
    mask_V: Tensor | None = None
    num_top: int = 0
    penalties: Penalties | None = None


class Draw(NamedTuple):
    """Tokens, their logprobs, and the likeliest (token, logprob) pairs where asked for.

    Logprobs are those of the model: untempered, unfiltered, without penalties and the mask of a grammar.
    """

    tokens: list[int]
    logprobs: list[float]
    tops: list[list[tuple[int, float]]]


class Cost(NamedTuple):
    """Bytes: of each token, of each token for each unit of the adapter's rank, and besides."""

    token: int
    rank: int
    fixed: int

    def of(self, num_tokens: int, rank: int) -> int:
        return num_tokens * (self.token + rank * self.rank) + self.fixed

    def __add__(self, other: object) -> "Cost":
        assert isinstance(other, Cost)
        return Cost(self.token + other.token, self.rank + other.rank, self.fixed + other.fixed)

    def times(self, factor: float) -> "Cost":
        return Cost(*(round(part * factor) for part in self))


class LayerCosts(NamedTuple):
    """Of all layers: what a pass takes without a backward; what it keeps for one, and what it takes beside that.

    The last two once more for a backward that computes the layers again.
    """

    forward: Cost
    kept: Cost
    work: Cost
    kept_less: Cost
    work_again: Cost


@dataclass(frozen=True, slots=True)
class Costs:
    """What a model takes of its device's memory, in bytes where nothing else is said.

    Args:
        weights: the base weights, once training has laid out what it needs of them.
        base_weights: the same before that.
        layers: activations of all layers.
        ends: what lies before the first layer and behind the last.
        rank_step: ranks are computed as if they were multiples of this.
        adapter_panels: bytes of an adapter's parameter in copies that a pass makes, forward and backward each.
        train_tokens: tokens of a micro-batch that are fast: enough to fill the products, few enough to stay small.
        logit_rows: rows whose float32 logits are held at once.
    """

    weights: int
    base_weights: int
    layers: LayerCosts
    ends: Cost
    rank_step: int
    adapter_panels: int
    train_tokens: int
    logit_rows: int


@dataclass(frozen=True, slots=True)
class Contracts:
    """What the engine may rely on; a model declares here what it cannot keep.

    Args:
        paged: the samples of a prompt share the pages that it filled. Without it the cache forks whole slots.
        prefixes: a prompt may begin with pages that another filled. Without it prompts share nothing.
        state_tokens: of a model with recurrent states, which lie in no page: a prompt may begin with what another
            filled at a multiple of so many tokens, whole pages, where a copy of the states was kept. None: at any page.
        packed: each sequence of a batch gets the numbers it has alone. Without it sequences come one a call.
        batch_invariant: and the same bits, whatever else is in the batch. Without it an engine that is asked to be
            deterministic computes the blocks of different runs apart.
        routes: it goes by a batch's routing. Without it routes are neither recorded nor replayed.
        images: rows may be those of images (:class:`ImageRows`). Without it there are none.
    """

    paged: bool = True
    prefixes: bool = True
    state_tokens: int | None = None
    packed: bool = True
    batch_invariant: bool = False
    routes: bool = False
    images: bool = False


class Cache(Protocol):
    """Keys and values (or states) of sequences. Owns the pages of ``pool``."""

    pool: PagePool
    num_bytes: int
    """What it takes when it is full."""

    def fork(self, slot: CacheSlot, into: CacheSlot) -> None:
        """A sample begins where its prompt ends. Pages are shared and copied already: with only those, nothing."""
        ...

    def write_back(self, slot: CacheSlot, stop: int) -> None:
        """Bring the slot's pages up to date, as far as tokens before ``stop`` go."""
        ...

    def leave(self, slot: CacheSlot) -> None:
        """Forget what there is of a slot beside its pages."""
        ...


class Model(Protocol):
    """A frozen base model, which adapters are added to. Not thread-safe.

    Hidden states h are after the final norm, in the compute dtype. Rows of no adapter see the base model only.
    """

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    contracts: Contracts
    kept_as: KeptAs | None
    """What the matrices of its layers are kept in; None for the compute type."""
    computed_by: str
    """What does the arithmetic, in words for people."""

    def forward(self, batch: Varlen, lora: AdapterBatch, *, recompute: bool = False) -> Tensor:
        """h_TD of whole sequences; gradients reach the adapters.

        Args:
            recompute: keep only what goes into each layer; the backward computes the rest again, a layer at a time.
        """
        ...

    def forward_cached(self, batch: Varlen, cache: Cache, lora: AdapterBatch) -> Tensor:
        """h_TD of tokens whose predecessors are in the cache, which they join. Prefill and decode; no gradients.

        Every slot of a batch grows, or none does; rows of one adapter stand together.
        """
        ...

    def score(self, h_ND: Tensor, targets: Tensor, num_top: int, adapter: Adapter | None) -> Scores:
        """float32 logprobs of ``targets``, (N,) or (N, K), and each row's ``num_top`` likeliest (all, if fewer).

        No (N, V) logits exist at once. Gradients reach ``h_ND`` and the output layer's part of ``adapter``.
        """
        ...

    def logits(self, h_ND: Tensor, lora: AdapterBatch) -> Tensor:
        """float32 logits (N, V), summed in float32; ``lora`` counts these rows. No gradients."""
        ...

    def draw(self, logits_BV: Tensor, rows: list[Row], num_tokens: int) -> Draw:
        """One token a row from float32 logits; ids from ``num_tokens`` on are padding and never drawn."""
        ...

    def make_cache(self, num_tokens: int | None) -> Cache:
        """Room for so many tokens over all sequences; None for what suits the device, at least one full context."""
        ...

    def costs(self) -> Costs: ...


class Planned(Protocol):
    """What memory is planned by: a model, or one that is only described and holds no weights."""

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def costs(self) -> Costs: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """A model that is only described; see :class:`Planned`."""

    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    known: Costs

    def costs(self) -> Costs:
        return self.known


class Backend(Protocol):
    """A way to compute models.

    ``kept_as`` is the form of fewer bits that the matrices of the layers are kept in; None is the compute type.
    """

    name: str

    def lacks(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None
    ) -> Lacking | None:
        """Why it does not compute this model there, in words; None where it does."""
        ...

    def plan(
        self, spec: ModelSpec, device: torch.device, dtype: torch.dtype, kept_as: KeptAs | None = None
    ) -> Planned | None:
        """What :meth:`load` would give, as far as memory goes, without weights; None where only a loaded model tells.

        The device need not be there.
        """
        ...

    def load(
        self,
        spec: ModelSpec,
        source: TensorSource,
        device: torch.device,
        dtype: torch.dtype,
        kept_as: KeptAs | None = None,
    ) -> Model:
        """Raises OperationFailed: the weights are not those of the model, or cannot be read."""
        ...
