"""The other side: transformers and PEFT doing the same work, as well as their public options allow."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from bench.harness.measure import now
from bench.harness.work import IGNORED_TARGET, labels_of

logging.disable_progress_bar()

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Generated(NamedTuple):
    """New tokens (B, N), logits of each step (or None) and times as :class:`bench.harness.ours.Drawn` has them."""

    tokens_BN: Tensor
    logits: tuple[Tensor, ...] | None
    first_s: float
    rest_s: float

    @property
    def total_s(self) -> float:
        return self.first_s + self.rest_s


class _Clock(StoppingCriteria):
    """Never stops; notes when each token was there."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.at.append(now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def load_base(model_dir: Path, dtype: torch.dtype, device: str) -> Any:
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="sdpa").to(device)
    base.config.use_cache = False  # wanted in generation alone, which asks for it
    base.generation_config = GenerationConfig(
        eos_token_id=None, pad_token_id=0
    )  # or its own end tokens would end samples
    return base.eval()


class PeftTrainer:
    """A LoRA adapter on every linear layer, trained by AdamW.

    Args:
        autocast_adapter: PEFT's own default holds the adapter in float32; False holds it in the model's dtype.
    """

    def __init__(
        self, model_dir: Path, dtype: torch.dtype, device: str, rank: int, *, autocast_adapter: bool = True
    ) -> None:
        config = LoraConfig(r=rank, lora_alpha=32, target_modules=TARGETS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = load_base(model_dir, dtype, device)
            self.model: Any = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter)
        self.model.train()
        self.device = device
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self.trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def step(self, batch: dict[str, Tensor]) -> None:
        """Forward, backward and AdamW step on one padded batch."""
        self.model(**batch).loss.backward()
        self.apply()

    def apply(self) -> None:
        """Clip the gradients that are there, step, clear."""
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def batch(self, ids: Sequence[Sequence[int]], supervised: float = 1.0) -> dict[str, Tensor]:
        """The sequences less their last token, padded on the right to the longest, as a data collator does it."""
        longest = max(len(s) - 1 for s in ids)
        tokens, mask, labels = (torch.zeros(len(ids), longest, dtype=torch.int64) for _ in range(3))
        labels.fill_(IGNORED_TARGET)
        for row, s in enumerate(ids):
            length = len(s) - 1
            tokens[row, :length] = torch.tensor(s[:-1])
            mask[row, :length] = 1
            # Labels are at their own token here: the model shifts them.
            labels[row, 1:length] = torch.tensor(labels_of(s, supervised)[: length - 1])
        batch = {"input_ids": tokens, "labels": labels}
        if int(mask.min()) == 0:
            batch["attention_mask"] = mask
        return {name: values.to(self.device) for name, values in batch.items()}


@torch.inference_mode()
def generate(
    model: Any, prompts: Tensor, max_tokens: int, *, num_samples: int = 1, with_logits: bool = False
) -> Generated:
    """Sample ``max_tokens`` tokens of each prompt (B, N), at temperature 1, to the full length."""
    clock = _Clock()
    config = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
        num_return_sequences=num_samples,
        output_logits=with_logits,
        return_dict_in_generate=True,
    )
    started = now()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    tokens = made.sequences[:, prompts.shape[1] :]
    assert tokens.shape[1] == max_tokens, tokens.shape
    logits = tuple(made.logits) if with_logits else None
    return Generated(tokens, logits, clock.at[0] - started, clock.at[-1] - clock.at[0])
