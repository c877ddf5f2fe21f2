"""Which experts a model chose for its tokens, recorded as it samples and replayed as it trains: plain bytes."""

from typing import Literal

import msgspec

MAX_ROUTES_BYTES = 256 * 2**20
"""What one request may have recorded, or replayed."""


class ExpertCounts(msgspec.Struct):
    """Of a model's ``config.json``: families have three names for the number of experts."""

    num_experts: int | None = None
    num_local_experts: int | None = None
    n_routed_experts: int | None = None

    @property
    def has_experts(self) -> bool:
        return any((self.num_experts, self.num_local_experts, self.n_routed_experts))


class RouteShape(msgspec.Struct, frozen=True, array_like=True):
    """How the experts of a token lie: (num_layers, top_k) little-endian numbers of ``dtype``.

    Args:
        num_layers: layers with experts, in the order of the model; others are not counted.
    """

    dtype: Literal["uint8", "int16"]
    num_layers: int
    top_k: int

    @property
    def token_bytes(self) -> int:
        return self.num_layers * self.top_k * (1 if self.dtype == "uint8" else 2)


class SampledRoutes(msgspec.Struct, frozen=True):
    """The routes of a request: of every token of its prompt, and of every sampled token but each sample's last.

    The last one never goes through the model.
    """

    shape: RouteShape
    prompt: bytes
    sequences: list[bytes]


class Routes(msgspec.Struct, frozen=True, array_like=True):
    """The routes that some tokens of a datum are to take; the others are routed anew.

    Args:
        spans: first token and number of tokens, ascending and apart.
        data: of these tokens, one after another.
    """

    shape: RouteShape
    spans: list[tuple[int, int]]
    data: bytes

    @property
    def num_tokens(self) -> int:
        return sum(length for _start, length in self.spans)
