"""A tiny random Qwen3.5 as the hub has it: text and eyes in one folder, and a tokenizer with the family's tokens."""

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

from tiny_models import save_quietly

MAX_POSITIONS = 4096
END_OF_TURN = "<|im_end|>"
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    END_OF_TURN,
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Tokens of their own, which are text: tokenizers do not leave them out when they decode.
MARKS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
_NUM_LEARNED = 400
_TEXT = [
    "the captain sails the old ship home before the winter, and the keeper lights the lamp\n\n",
    "What is the weather in Paris? You are a helpful assistant. English: banana split\nPig Latin: anana-bay plit-say",
    '{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}',
    "<function=look_up>\n<parameter=city>\nParis\n</parameter>\n</function>",
]
# Conversations as the family writes them; one system turn, tools and calls by tag, the last answer with its thinking.
_TEMPLATE = """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n\\n<tools>' }}
    {%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}
    {{- '\\n</tools>\\n\\nCalls: <tool_call>\\n<function=name>\\n<parameter=key>\\nvalue\\n</parameter>' }}
    {{- '\\n</function>' }}
    {{- '\\n</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last %}
        {{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content | trim }}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
        {%- for key, value in call.function.arguments | items %}
            {{- '<parameter=' + key + '>\\n' + (value | string) + '\\n</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n') }}
{%- endif %}"""


def save(directory: Path) -> Path:
    """Write the folder; the same weights every time."""
    directory.mkdir(parents=True)
    tokenizer = _tokenizer()
    ids = tokenizer.get_vocab()
    torch.manual_seed(0)
    text = {
        "model_type": "qwen3_5_text",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "max_position_embeddings": MAX_POSITIONS,
        "eos_token_id": ids["<|endoftext|>"],
        "tie_word_embeddings": True,
    }
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 64}
    config = AutoConfig.for_model(
        "qwen3_5",
        text_config=text,
        vision_config=eyes,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.05))
        # The output layer is frozen: it must be able to say a token with certainty, or no training could teach that.
        model.get_input_embeddings().weight.mul_(6)
    save_quietly(model, directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": END_OF_TURN,
            "pad_token": SPECIAL[0],
            "unk_token": None,
            "model_max_length": MAX_POSITIONS,
            "clean_up_tokenization_spaces": False,
            "added_tokens_decoder": {
                str(ids[token]): {"content": token, "special": token in SPECIAL} for token in (*SPECIAL, *MARKS)
            },
        },
    )
    _write(directory / "generation_config.json", {"eos_token_id": [ids[END_OF_TURN], ids[SPECIAL[0]]]})
    (directory / "chat_template.jinja").write_text(_TEMPLATE)
    return directory


def _tokenizer() -> Tokenizer:
    """Byte-level pairs learned from a few lines, split as the family's are; its tokens of their own come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_NUM_LEARNED, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKS])
    return tokenizer


def _write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content))
