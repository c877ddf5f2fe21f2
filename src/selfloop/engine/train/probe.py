"""The trainer's logprobs of one short text, to compare with those of a sampler that serves the same weights."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from selfloop.engine.train.forward_cache import ForwardCache
from selfloop.engine.train.request import LossRequest, Workshop
from selfloop.engine.train.run import Run
from selfloop.types.datum import Datum, Tensor
from selfloop.types.operation import Forward
from selfloop.types.result import Probe

_NUM_TOKENS = 16
# Mean absolute difference in nats; docs/numerics.md says why.
_BOUNDS = {"float32": 1e-3, "bfloat16": 0.2}


def probe(
    run_id: str, run: Run, workshop: Workshop, advance: Callable[[Sequence[LossRequest]], None], dtype: str
) -> Probe:
    """Score tokens spread over the vocabulary; the run is only read, and nothing is kept of the pass.

    Args:
        advance: :meth:`Engine.advance`.
        dtype: what is computed in.
    """
    spec = workshop.spec
    num = min(_NUM_TOKENS, spec.context)
    tokens = [(2 * i + 1) * spec.vocab_size // (2 * num) for i in range(num)]
    datum = Datum(Tensor.of(tokens[:-1], "int64"), {"target_tokens": Tensor.of(tokens[1:], "int64")})
    # A cache of its own: what is known of the run's own operations stays as it is.
    request = LossRequest(
        run_id, run, Forward([datum], "cross_entropy", {}), replace(workshop, forward_cache=ForwardCache(limit_bytes=0))
    )
    while not request.job.is_done:
        advance([request])
    # Weights that have diverged: the loss is not finite, and no logprob is reported.
    failed = request.job.failure is not None
    logprobs = [math.nan] * (num - 1) if failed else request.result().logprobs[0].values()
    return Probe(tokens, list(logprobs), _BOUNDS[dtype], run.shape.changes_nothing(run.theta_P))
