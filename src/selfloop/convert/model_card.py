"""The README.md of an export: what it is and how it is loaded."""


def adapter_card(base_model: str, rank: int, alpha: float, step: int) -> str:
    return f"""---
base_model: {base_model}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
---

# LoRA adapter for {base_model}

{_facts(base_model, rank, alpha, step)}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base_model}")
model = PeftModel.from_pretrained(base, "<this folder>")
```
"""


def merged_card(base_model: str, rank: int, alpha: float, step: int) -> str:
    return f"""---
base_model: {base_model}
library_name: transformers
pipeline_tag: text-generation
---

# {base_model}, fine-tuned

The base model with a LoRA adapter merged into its weights. The terms of the base model's license apply to it.

{_facts(base_model, rank, alpha, step)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("<this folder>", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("<this folder>")
```
"""


def gguf_card(base_model: str, rank: int, alpha: float, step: int) -> str:
    return f"""---
base_model: {base_model}
library_name: gguf
pipeline_tag: text-generation
---

# {base_model}, fine-tuned

The base model with a LoRA adapter merged into its weights, as llama.cpp reads it. The terms of the base model's license
apply to it.

{_facts(base_model, rank, alpha, step)}

```
llama-cli -m model.gguf
llama-quantize model.gguf model-q4_k_m.gguf Q4_K_M
```
"""


def _facts(base_model: str, rank: int, alpha: float, step: int) -> str:
    return f"""| | |
| --- | --- |
| base model | {base_model} |
| LoRA rank | {rank} |
| LoRA alpha | {alpha:g} |
| training steps | {step} |"""
