"""What an engine may take of its device."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """None leaves a limit to the engine, which goes by the device and by what the base weights leave of its memory.

    Args:
        train_token_budget: tokens of a micro-batch, of training and of prefill.
        activation_bytes: what one pass of training may take; longer sequences than fit are refused.
        kept_bytes: what forwards that wait for their backward may take; 0 keeps none, and computes them twice.
        memory_bytes: what all processes of the engine may take together, of the device's memory.
        max_kv_tokens: tokens the KV cache holds over all requests.
        max_adapters: sampling adapters kept in memory.
    """

    train_token_budget: int | None = None
    activation_bytes: int | None = None
    kept_bytes: int | None = None
    memory_bytes: int | None = None
    max_kv_tokens: int | None = None
    max_adapters: int = 32
