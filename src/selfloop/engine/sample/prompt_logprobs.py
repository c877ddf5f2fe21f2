"""Logprobs and ranks of the prompt's own tokens."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.losses.logprob import chunk_rows
from selfloop.engine.models.decoder import Decoder
from selfloop.types.sampling import TokenLogprob


def prompt_logprobs(
    decoder: Decoder,
    h_ND: Tensor,
    next_tokens: list[int],
    k: int,
    adapter: Adapter | None,
    raw: Callable[[int], bytes | None],
) -> Iterator[list[TokenLogprob]]:
    """For each row, the actual next token first, then the k likeliest others by rank.

    Args:
        raw: what a token stands for, or None where nobody asked.
    """
    assert h_ND.shape[0] == len(next_tokens)
    k = min(k, decoder.config.vocab_size - 1)
    rows = chunk_rows(decoder.config.vocab_size)
    for start in range(0, len(next_tokens), rows):
        h_CD = h_ND[start : start + rows]
        logprobs_CV = decoder.logits(h_CD, AdapterBatch.of([(h_CD.shape[0], adapter)])).log_softmax(-1)
        actual_C = torch.tensor(next_tokens[start : start + rows], device=h_ND.device)
        chosen_C1 = logprobs_CV.gather(1, actual_C[:, None])
        ranks: list[int] = ((logprobs_CV > chosen_C1).sum(1) + 1).tolist()
        top_values, top_tokens = logprobs_CV.topk(k + 1, dim=1)
        values: list[float] = chosen_C1.squeeze(1).tolist()
        tops = zip(top_tokens.tolist(), top_values.tolist(), strict=True)
        for token, value, rank, top in zip(actual_C.tolist(), values, ranks, tops, strict=True):
            others = [
                TokenLogprob(other, logprob, place, raw(other))
                for place, (other, logprob) in enumerate(zip(*top, strict=True), start=1)
                if other != token
            ]
            yield [TokenLogprob(token, value, rank, raw(token)), *others[:k]]
