"""The experts of one request's tokens, gathered pass by pass."""

import torch
from torch import Tensor

from selfloop.engine.backends.base import Model
from selfloop.engine.routing import NO_ROUTES, Mixtures
from selfloop.types.errors import BadRequest
from selfloop.types.routes import MAX_ROUTES_BYTES, SampledRoutes
from selfloop.types.sampling import SampleRequest


class RouteLog:
    """What a request's passes note down, and in the end its :class:`SampledRoutes`."""

    @classmethod
    def of(cls, request: SampleRequest, model: Model) -> "RouteLog | None":
        """None where the request does not ask for it.

        Raises:
            BadRequest: the model's routes cannot be recorded, or they may be more than there is room for.
        """
        if not request.routes:
            return None
        mixtures = Mixtures.of(model.spec) if model.contracts.routes else None
        if mixtures is None:
            raise BadRequest("include_routed_experts", f"null or false: {NO_ROUTES}")
        return cls(mixtures, request)

    def __init__(self, mixtures: Mixtures, request: SampleRequest) -> None:
        self.mixtures = mixtures
        self._prompt: list[Tensor] = []
        self._samples: list[list[Tensor]] = [[] for _ in range(request.num_samples)]
        num_tokens = len(request.prompt) + request.num_samples * (request.params.max_tokens - 1)
        most = MAX_ROUTES_BYTES // mixtures.shape.token_bytes
        if num_tokens > most:
            raise BadRequest(
                "include_routed_experts",
                f"at most {most:,} tokens, of prompt and samples, whose experts are recorded; {num_tokens:,} may come: "
                "ask for fewer samples or a lower max_tokens",
            )

    def add_prompt(self, experts_NLK: Tensor) -> None:
        self._prompt.append(experts_NLK)

    def add_token(self, sample: int, experts_LK: Tensor) -> None:
        self._samples[sample].append(experts_LK)

    def result(self) -> SampledRoutes:
        return SampledRoutes(
            self.mixtures.shape,
            self.mixtures.packed(torch.cat(self._prompt)),
            [self.mixtures.packed(torch.stack(tokens)) if tokens else b"" for tokens in self._samples],
        )
