"""A sampling request on its way through the scheduler, and the samples it draws."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.base import CacheSlot
from selfloop.engine.kv.pages import PAGE_TOKENS, pages_for
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.sample.grammar import Constraint, Grammar
from selfloop.engine.sample.penalties import Penalties
from selfloop.engine.sample.prompt_logprobs import PromptScores
from selfloop.engine.sample.route_log import RouteLog
from selfloop.engine.sample.text import SampleText, StopString
from selfloop.engine.vision.rows import keys, plane_shift, runs
from selfloop.engine.vision.sight import SeenImage
from selfloop.types.sampling import SampleDelta, SampledSequence, SampleRequest, TokenLogprob

StopReason = Literal["stop", "length"]


@dataclass(eq=False)
class ActiveRequest:
    """State of one request.

    Args:
        stream: whether the samples are reported as they grow.
        grammar: what every sample must match.
        slot: cache of the prompt, until every sample has started.
        paged: whether samples share the pages that are full of prompt.
        num_prefilled: prompt tokens already in the cache.
        num_found: of these, how many were there before it came.
        first_logits_V: float32 logits after the prompt, once it is prefilled.
        num_started: samples that have started.
        prompt_scores: filled as the prompt is prefilled, when asked for.
        routes: likewise, and as its samples grow.
        images: those of the prompt.
    """

    request: SampleRequest
    adapter: Adapter | None
    stream: bool = False
    grammar: Grammar | None = None
    stops: list[StopString] = field(default_factory=list[StopString])
    slot: CacheSlot = field(default_factory=lambda: CacheSlot([]))
    paged: bool = True
    num_prefilled: int = 0
    num_found: int = 0
    first_logits_V: Tensor | None = None
    num_started: int = 0
    prompt_scores: PromptScores | None = None
    routes: RouteLog | None = None
    images: Sequence[SeenImage] = ()
    finished: dict[int, SampledSequence] = field(default_factory=dict[int, SampledSequence])

    @cached_property
    def keys(self) -> list[int]:
        """The prompt as the prefix cache knows it: other images are other tokens."""
        return keys(self.request.prompt, self.images)

    @cached_property
    def rotary_shift(self) -> int:
        """What new tokens are rotated by, less their positions."""
        return plane_shift(self.images)

    def chunk_stop(self, stop: int) -> int:
        """``stop``, or the end of the image whose tokens see one another across it."""
        ahead = runs([image for image in self.images if image.sees_ahead])
        return next((run.stop for run in ahead if run.start < stop < run.stop), stop)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def prompt_pages(self) -> int:
        return pages_for(self.prompt_length)

    @property
    def shared_pages(self) -> int:
        """Pages full of prompt, which all samples read and none writes."""
        return self.prompt_length // PAGE_TOKENS if self.paged else 0

    @property
    def sample_pages(self) -> int:
        """Pages of its own that one sample may need; the last token is never cached."""
        return pages_for(self.prompt_length + self.request.params.max_tokens - 1) - self.shared_pages

    @property
    def is_prefilled(self) -> bool:
        return self.num_prefilled == self.prompt_length

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether what it asks for is read off the prompt's pass, and in no cache."""
        return self.request.asks_about_prompt or self.routes is not None

    @property
    def all_started(self) -> bool:
        return self.num_started == self.request.num_samples

    @property
    def is_finished(self) -> bool:
        return len(self.finished) == self.request.num_samples


class Sent(NamedTuple):
    """Tokens and pieces of text."""

    tokens: int
    pieces: int


@dataclass(slots=True, eq=False)
class Sample:
    """One continuation being drawn.

    Args:
        constraint: what it may draw next; None for anything.
        penalties: what changes the logits it is drawn from; None for nothing.
        top_logprobs: the likeliest tokens at each position, when asked for.
        token_bytes: what each token stands for, when asked for.
        slot: its cache.
        sent: how much of it was reported.
    """

    parent: ActiveRequest
    index: int
    slot: CacheSlot
    generator: torch.Generator
    text: SampleText
    constraint: Constraint | None = None
    penalties: Penalties | None = None
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    top_logprobs: list[list[TokenLogprob]] | None = None
    token_bytes: list[bytes] | None = None
    sent: Sent = field(default_factory=lambda: Sent(0, 0))

    @property
    def position(self) -> int:
        """Position of the newest token, which is not in the cache yet."""
        return self.parent.prompt_length + len(self.tokens) - 1

    @property
    def rotary_position(self) -> int:
        """What the newest token is rotated by."""
        return self.position + self.parent.rotary_shift

    def uniform(self) -> float:
        """The next number in [0, 1) of this sample's own stream."""
        return float(torch.rand((), dtype=torch.float64, generator=self.generator))

    def finished(self, reason: StopReason) -> SampledSequence:
        return SampledSequence(
            self.tokens,
            self.logprobs,
            reason,
            str(self.text),
            self.top_logprobs,
            self.token_bytes,
            self.text.stopped_by,
        )

    def delta(self, reason: StopReason | None) -> SampleDelta:
        """What it grew by since the last call."""
        start, piece = self.sent
        self.sent = Sent(len(self.tokens), len(self.text.pieces))
        return SampleDelta(
            self.index,
            self.tokens[start:],
            self.logprobs[start:],
            "".join(self.text.pieces[piece:]),
            reason,
            None if self.top_logprobs is None else self.top_logprobs[start:],
            None if self.token_bytes is None else self.token_bytes[start:],
            None if reason is None else self.text.stopped_by,
            self.parent.num_found,
        )
