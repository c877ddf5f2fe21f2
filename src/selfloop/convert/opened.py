"""A model folder as transformers opens it, to compare with what was served."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfloop.types.errors import OperationFailed


@torch.inference_mode()
def logits_by_transformers(folder: Path, stored: set[torch.dtype], tokens_T: Tensor) -> Tensor:
    """Logits (T, V) of ``AutoModelForCausalLM`` in float32; of weights that are kept in less, a layer at a time.

    Args:
        stored: the dtypes that the weights are kept in.

    Raises:
        OperationFailed: transformers does not open the folder.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    held = next(iter(stored)) if stored in ({torch.bfloat16}, {torch.float16}) else torch.float32
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=held, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise OperationFailed(f"transformers does not open what was written: {error}") from error
    model.eval()
    if held is not torch.float32:
        _compute_in_float32(model, held)
    return model(tokens_T[None]).logits[0].float()


def _compute_in_float32(model: Any, held: torch.dtype) -> None:
    def widen(layer: nn.Module, _inputs: object) -> None:
        layer.float()

    def narrow(layer: nn.Module, _inputs: object, _outputs: object) -> None:
        layer.to(held)

    for part in (model.get_input_embeddings(), model.model.norm, model.get_output_embeddings()):
        part.float()
    for layer in model.model.layers:
        layer.register_forward_pre_hook(widen)
        layer.register_forward_hook(narrow)
