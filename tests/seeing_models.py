"""Tiny random models that see, saved as Hugging Face folders, and pictures for them."""

import io
import json
import random
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pictures
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

import tiny_models
from selfloop.types.images import Image, read_size
from selfloop.types.vision import VisionFacts, read_vision
from served_model import EOS, NUM_TOKENS, SPECIAL, byte_tokenizer

FAMILIES = ("gemma3", "qwen3_5")
MIXTURE = "qwen3_5_moe"
"""Of the eyes of Qwen3.5, and of experts."""

VOCAB_SIZE = 272
BEFORE, AFTER, IMAGE_TOKEN = range(NUM_TOKENS, NUM_TOKENS + 3)
MARKS = {
    "gemma3": ("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    "qwen3_5": ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>"),
}
"""Before an image, behind it, and in its places."""

_SHOWN = {"gemma3": "<start_of_image>", "qwen3_5": "<|vision_start|><|image_pad|><|vision_end|>"}
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CONFIGS: dict[str, dict[str, Any]] = {
    # An image is more tokens than the window.
    "gemma3": {
        "text_config": {
            **_TEXT,
            "model_type": "gemma3_text",
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
        },
        "mm_tokens_per_image": 16,
        "image_token_index": IMAGE_TOKEN,
        "boi_token_index": BEFORE,
        "eoi_token_index": AFTER,
        "tie_word_embeddings": True,
    },
    "qwen3_5": {
        "text_config": {
            **_TEXT,
            "model_type": "qwen3_5_text",
            "head_dim": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 8,
            "num_position_embeddings": 16,
        },
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": IMAGE_TOKEN + 1,
        "vision_start_token_id": BEFORE,
        "vision_end_token_id": AFTER,
        "tie_word_embeddings": False,
    },
}
_QWEN = _CONFIGS["qwen3_5"]
_CONFIGS[MIXTURE] = _QWEN | {
    "text_config": _QWEN["text_config"]
    | {
        "model_type": "qwen3_5_moe_text",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
}
_PROCESSORS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 64, "width": 64},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.3],
    },
    "qwen3_5": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 1024, "longest_edge": 4096},
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.25, 0.3],
    },
}


_PROCESSORS[MIXTURE] = _PROCESSORS["qwen3_5"]
MARKS[MIXTURE], _SHOWN[MIXTURE] = MARKS["qwen3_5"], _SHOWN["qwen3_5"]


def build(family: str) -> PreTrainedModel:
    """A float32 model whose weights are large enough that attention, norms and its eyes matter."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **_CONFIGS[family]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3))
    return model.eval()


def save(family: str, folder: Path) -> Path:
    """With a byte-level tokenizer and a chat template."""
    tiny_models.save_quietly(build(family), folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PROCESSORS[family]), encoding="utf-8")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in MARKS[family]])
    tokenizer.save(str(folder / "tokenizer.json"))
    before, after, image = MARKS[family]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[0],
        "extra_special_tokens": {"boi_token": before, "eoi_token": after, "image_token": image},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_CHATML.replace("IMAGE", _SHOWN[family]), encoding="utf-8")
    return folder


def facts(folder: Path) -> VisionFacts:
    found = read_vision(folder)
    assert isinstance(found, VisionFacts), found
    return found


def processor(family: str) -> Any:
    """transformers' own."""
    settings = {k: v for k, v in _PROCESSORS[family].items() if k != "image_processor_type"}
    return (Gemma3ImageProcessorPil if family == "gemma3" else Qwen2VLImageProcessorPil)(**settings)


def chat_processor(family: str, folder: Path) -> Any:
    """transformers' own of conversations, with the folder's tokenizer and chat template."""
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if family == "gemma3":
        num = _CONFIGS[family]["mm_tokens_per_image"]
        return Gemma3Processor(processor(family), tokenizer, chat_template=template, image_seq_length=num)
    return _ImagesOnly(processor(family), tokenizer, None, chat_template=template)


class _ImagesOnly(Qwen3VLProcessor):
    """Without videos, for which it needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def picture(seed: int, width: int = 48, height: int = 32, mode: str = "RGB") -> Pictures.Image:
    """Random blocks of colour."""
    chance = random.Random(seed)
    small = Pictures.frombytes("RGBA", (8, 8), chance.randbytes(256)).resize((width, height))
    return small.convert(mode)


def encoded(image: Pictures.Image, format: str = "png", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def image_at(start: int, data: bytes, seen_by: VisionFacts, format: str = "png") -> Image:
    size = read_size(data, format, "image")
    return Image("image", start, seen_by.sizing.num_tokens(size), format, data)  # type: ignore[arg-type]
