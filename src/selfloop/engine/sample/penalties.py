"""What a request asks to be added to logits before a draw: a bias by token, and penalties of what came before.

A token's logit l, given b of ``logit_bias``, r of ``repetition_penalty``, f of ``frequency_penalty``, p of
``presence_penalty`` and c, how often it was drawn in this sample, becomes

    l + b, then divided by r where it is above 0 and multiplied by r where it is below, if the token is in the prompt
    or was drawn, then less c * f, and less p if c > 0.

That is OpenAI's definition, with vLLM's of ``repetition_penalty`` and vLLM's order.
"""

import torch
from torch import Tensor

from selfloop.types.sampling import SamplingParams

# Room for so many tokens at first; it doubles.
_ROOM = 64


class Penalties:
    """Of one sample, as it grows; a token costs a step no more than one place in two short vectors.

    Args:
        num_tokens: ids from there on are never drawn.
    """

    def __init__(self, params: SamplingParams, prompt: list[int], num_tokens: int, device: torch.device) -> None:
        self._frequency = params.frequency_penalty
        self._presence = params.presence_penalty
        self._repetition = params.repetition_penalty
        self._device = device
        biases = {token: bias for token, bias in params.logit_bias.items() if token < num_tokens}
        self._biased_N = torch.tensor(list(biases), dtype=torch.int64, device=device)
        self._bias_N = torch.tensor(list(biases.values()), dtype=torch.float32, device=device)
        repeated = sorted({token for token in prompt if token < num_tokens}) if self._repetition != 1 else []
        self._prompt_N = torch.tensor(repeated, dtype=torch.int64, device=device)
        self._prompt = set(repeated)
        self._places: dict[int, int] = {}
        self._drawn_N = torch.zeros(_ROOM, dtype=torch.int64, device=device)
        self._counts_N = torch.zeros(_ROOM, dtype=torch.float32, device=device)

    @classmethod
    def of(cls, params: SamplingParams, prompt: list[int], num_tokens: int, device: torch.device) -> "Penalties | None":
        """None where nothing is asked for."""
        asked = params.frequency_penalty, params.presence_penalty, params.repetition_penalty - 1
        return cls(params, prompt, num_tokens, device) if any(asked) or params.logit_bias else None

    def add(self, token: int) -> None:
        """Count a token that was drawn."""
        place = self._places.setdefault(token, len(self._places))
        if place == self._drawn_N.shape[0]:
            self._drawn_N = torch.cat([self._drawn_N, torch.zeros_like(self._drawn_N)])
            self._counts_N = torch.cat([self._counts_N, torch.zeros_like(self._counts_N)])
        self._drawn_N[place] = token
        self._counts_N[place] += 1

    def apply(self, logits_V: Tensor) -> None:
        """Change the logits of the next token, float32, in place."""
        logits_V.index_add_(0, self._biased_N, self._bias_N)
        drawn_N, counts_N = self._drawn_N[: len(self._places)], self._counts_N[: len(self._places)]
        if self._repetition != 1:
            fresh = [token for token in self._places if token not in self._prompt]
            seen_N = torch.cat([self._prompt_N, torch.tensor(fresh, dtype=torch.int64, device=self._device)])
            seen = logits_V[seen_N]
            logits_V[seen_N] = torch.where(seen > 0, seen / self._repetition, seen * self._repetition)
        logits_V[drawn_N] = logits_V[drawn_N] - counts_N * self._frequency - self._presence
