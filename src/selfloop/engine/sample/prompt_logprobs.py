"""What a request asks about its prompt: logprobs of its own tokens, of the likeliest, of named and of drawn ones."""

from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from selfloop.engine.backends.base import Model
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch
from selfloop.engine.sample.sampler import draw_with_replacement, sample_generator
from selfloop.types.sampling import PromptDraws, SampleRequest, TokenLogprob

# The samples of a request draw from the streams 0, 1, ...
_STREAM = -1


class PromptScores:
    """Gathered as the prompt is prefilled, part by part, and from no more rows of logits than are needed.

    Row i of what follows is the distribution over the token at position i + 1.

    Args:
        num_tokens: ids from there on are padding of the model's vocabulary and never drawn or likeliest.
        raw: what a token stands for, or None where nobody asked.
    """

    def __init__(self, request: SampleRequest, num_tokens: int, raw: Callable[[int], bytes | None]) -> None:
        self._request = request
        self._num_tokens = num_tokens
        self._raw = raw
        num_rows = len(request.prompt) - 1
        last_n = request.prompt_logprobs_last_n
        self._first_own_row = 0 if last_n is None else max(0, num_rows - last_n)
        self.positions: list[list[TokenLogprob] | None] | None = None
        if request.prompt_logprobs is not None:
            self.positions = [None]
        self._starts = array("q")
        self._targets = array("i")
        self._target_logprobs: array[float] | None = None
        if request.prompt_targets is not None:
            self._starts.frombytes(request.prompt_targets.rows)
            self._targets.frombytes(request.prompt_targets.tokens)
            assert len(self._starts) == num_rows + 1
            self._target_logprobs = array("f", bytes(4 * len(self._targets)))
        self._drawn_tokens, self._drawn_logprobs = array("i"), array("f")
        self._generator = sample_generator(request.params.seed, _STREAM)

    @property
    def target_logprobs(self) -> bytes | None:
        return None if self._target_logprobs is None else self._target_logprobs.tobytes()

    @property
    def draws(self) -> PromptDraws | None:
        if self._request.prompt_draws == 0:
            return None
        return PromptDraws(self._drawn_tokens.tobytes(), self._drawn_logprobs.tobytes())

    def add(self, model: Model, first_row: int, h_ND: Tensor, adapter: Adapter | None) -> None:
        """Look at the rows from ``first_row`` on, of which these are the hidden states; the last has no successor."""
        stop = min(first_row + h_ND.shape[0], len(self._request.prompt) - 1)
        needed = [row for row in range(first_row, stop) if self._needs(row)]
        if self.positions is not None:
            self.positions += [None] * (max(first_row, min(stop, self._first_own_row)) - first_row)
        size = model.costs().logit_rows
        for at in range(0, len(needed), size):
            rows = needed[at : at + size]
            h_CD = h_ND[torch.tensor(rows, device=h_ND.device) - first_row]
            logits_CV = model.logits(h_CD, AdapterBatch.of([(h_CD.shape[0], adapter)]))
            logprobs_CV = logits_CV.log_softmax(-1)
            self._add_own(rows, logprobs_CV)
            self._add_targets(rows, logprobs_CV)
            self._add_draws(logits_CV, logprobs_CV)

    def _needs(self, row: int) -> bool:
        if self._request.prompt_draws > 0 or (self.positions is not None and row >= self._first_own_row):
            return True
        return self._target_logprobs is not None and any(token >= 0 for token in self._targets_of(row))

    def _targets_of(self, row: int) -> "array[int]":
        return self._targets[self._starts[row] : self._starts[row + 1]]

    def _add_own(self, rows: list[int], logprobs_CV: Tensor) -> None:
        if self.positions is None:
            return
        skipped = sum(row < self._first_own_row for row in rows)
        if skipped == len(rows):
            return
        rows, logprobs_CV = rows[skipped:], logprobs_CV[skipped:]
        assert self._request.prompt_logprobs is not None
        k = min(self._request.prompt_logprobs, self._num_tokens - 1)
        actual_C = torch.tensor([self._request.prompt[row + 1] for row in rows], device=logprobs_CV.device)
        chosen_C1 = logprobs_CV.gather(1, actual_C[:, None])
        real_CV = logprobs_CV[:, : self._num_tokens]
        ranks: list[int] = ((real_CV > chosen_C1).sum(1) + 1).tolist()
        top_values, top_tokens = real_CV.topk(k + 1, dim=1)
        values: list[float] = chosen_C1.squeeze(1).tolist()
        tops = zip(top_tokens.tolist(), top_values.tolist(), strict=True)
        for token, value, rank, top in zip(actual_C.tolist(), values, ranks, tops, strict=True):
            others = [
                TokenLogprob(other, logprob, place, self._raw(other))
                for place, (other, logprob) in enumerate(zip(*top, strict=True), start=1)
                if other != token
            ]
            self.positions.append([TokenLogprob(token, value, rank, self._raw(token)), *others[:k]])

    def _add_targets(self, rows: list[int], logprobs_CV: Tensor) -> None:
        if self._target_logprobs is None:
            return
        cells: list[int] = []
        places: list[tuple[int, int]] = []
        for place, row in enumerate(rows):
            for at, token in enumerate(self._targets_of(row), start=self._starts[row]):
                if token >= 0:
                    cells.append(at)
                    places.append((place, token))
        if not cells:
            return
        place_T, token_T = torch.tensor(places, device=logprobs_CV.device).T
        for cell, value in zip(cells, logprobs_CV[place_T, token_T].tolist(), strict=True):
            self._target_logprobs[cell] = value

    def _add_draws(self, logits_CV: Tensor, logprobs_CV: Tensor) -> None:
        k = self._request.prompt_draws
        if k == 0:
            return
        uniforms_CK = torch.rand((logits_CV.shape[0], k), dtype=torch.float64, generator=self._generator)
        real_CV = logits_CV[:, : self._num_tokens]
        tokens_CK = draw_with_replacement(real_CV, self._request.params.temperature, uniforms_CK)
        self._drawn_tokens.extend(tokens_CK.flatten().tolist())
        self._drawn_logprobs.extend(logprobs_CV.gather(1, tokens_CK).flatten().tolist())
