"""A tiny model that can be served whole: weights, a byte-level tokenizer and a ChatML template."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from gateway import MAX_POSITIONS
from tiny_models import save_quietly

NAME = "tiny/llama"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS = 2
NUM_TOKENS = len(SPECIAL) + 256
VOCAB_SIZE = 264

_CHATML = (
    "{% for tool in tools or [] %}<tool_call>{{ tool['function']['name'] }}</tool_call>\n{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}


def save(directory: Path) -> Path:
    """Write the model folder; the same weights every time."""
    return _save(lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)), directory)


def save_experts(directory: Path) -> Path:
    """A model with experts."""
    return _save(lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **_EXPERTS, head_dim=16)), directory)


def _save(make: Callable[[], PreTrainedModel], directory: Path) -> Path:
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.2))
        # The head is frozen: it must be able to say a token with certainty, or no training could teach that.
        model.lm_head.weight.mul_(3)
    save_quietly(model, directory)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[0],
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (directory / "chat_template.jinja").write_text(_CHATML)
    return directory


def save_adapter(model_dir: Path, folder: Path, **settings: object) -> Path:
    """An adapter that the PEFT library made and saved: rank 4, alpha 16, on some of the projections."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        base.name_or_path = NAME
        options = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings
        model = get_peft_model(base, LoraConfig(**options))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        model.save_pretrained(folder)
    return folder


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer
