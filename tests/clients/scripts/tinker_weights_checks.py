"""Runs in the cookbook's own Python: downloads weights and reads them with the cookbook. Prints JSON.

Arguments: the folder of the base model's files, and one to write to.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tinker
import torch
from tinker import types
from tinker_cookbook import weights
from transformers import AutoModelForCausalLM

model_dir, folder = Path(sys.argv[1]), Path(sys.argv[2])
tokens = list(range(5, 21))
targets = types.TensorData.from_numpy(np.array(tokens[1:], dtype=np.int64))
datum = types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": targets})

service = tinker.ServiceClient()
client = service.create_lora_training_client("tiny/llama", rank=4, seed=1).result()
for _ in range(3):
    client.forward_backward([datum], "cross_entropy").result()
    client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
expected = client.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
paths = [client.save_state("w").result().path, client.save_weights_external("e").result().path]
adapters = [folder / name for name in ("trained", "external")]
for path, adapter in zip(paths, adapters, strict=True):
    weights.download(tinker_path=path, output_dir=str(adapter))
weights.build_hf_model(base_model=str(model_dir), adapter_path=str(adapters[0]), output_path=str(folder / "merged"))
weights.build_lora_adapter(base_model=str(model_dir), adapter_path=str(adapters[0]), output_path=str(folder / "peft"))


def logprobs(path: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        rows = torch.log_softmax(model(torch.tensor([tokens[:-1]])).logits[0], dim=-1)
    return rows[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])].numpy()


print(
    json.dumps(
        {
            "files": [sorted(path.name for path in adapter.iterdir()) for adapter in adapters],
            "same": (adapters[0] / "adapter_model.safetensors").read_bytes()
            == (adapters[1] / "adapter_model.safetensors").read_bytes(),
            "left": [c.checkpoint_id for c in tinker.RestClient().list_user_checkpoints().result().checkpoints],
            "difference": float(np.abs(logprobs(folder / "merged") - expected).max()),
            "effect": float(np.abs(logprobs(model_dir) - expected).max()),
            "peft": sorted(path.name for path in (folder / "peft").iterdir()),
        }
    )
)
