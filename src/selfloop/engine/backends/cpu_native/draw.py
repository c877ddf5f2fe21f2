"""Draws by the kernels, wherever logits lie on a CPU that has them; by PyTorch's operators elsewhere."""

from functools import partial

import torch
from torch import Tensor

from selfloop.engine.backends.base import Draw, Row
from selfloop.engine.backends.cpu_native.build import kernels
from selfloop.engine.backends.cpu_native.library import Kernels
from selfloop.engine.sample import sampler
from selfloop.engine.sample.sampler import is_changed, is_filtered, likeliest, pick


def draw(logits_BV: Tensor, rows: list[Row], num_tokens: int | None = None) -> Draw:
    """See :func:`selfloop.engine.sample.sampler.draw`."""
    found = kernels() if logits_BV.device.type == "cpu" and logits_BV.stride(1) == 1 else None
    if found is None:
        return sampler.draw(logits_BV, rows, num_tokens)
    return sampler.draw(logits_BV, rows, num_tokens, partial(_by_kernels, found))


def _by_kernels(kernels: Kernels, logits_BV: Tensor, rows: list[Row], num_tokens: int) -> Draw:
    """The kernels say all logprobs, and draw where nothing changes the logits: a row depends on itself alone."""
    temperatures = [row.params.temperature for row in rows]
    uniforms = [row.uniform for row in rows]
    tokens_B, logprobs_B, normalisers_B = kernels.draw(logits_BV, num_tokens, temperatures, uniforms)
    at = [place for place, row in enumerate(rows) if is_changed(row) or is_filtered(row.params)]
    if at:
        at_N = torch.tensor(at)
        tokens_B[at_N] = pick(logits_BV[at_N, :num_tokens], [rows[place] for place in at])
        logprobs_B[at_N] = logits_BV[at_N, tokens_B[at_N]] - normalisers_B[at_N]
    return Draw(tokens_B.tolist(), logprobs_B.tolist(), likeliest(logits_BV[:, :num_tokens], normalisers_B, rows))
