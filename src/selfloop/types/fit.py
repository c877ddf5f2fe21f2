"""What a base model would take of a device's memory, as the engine plans it without loading any weights."""

import msgspec


class PassPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Training and sampling of a model on a device, in bytes and tokens.

    Args:
        weights_bytes: base weights, once training has laid out what it needs of them.
        pass_limit_bytes: what one pass of training may take.
        kept_limit_bytes: what forwards may take until their backward.
        run_limit_bytes: what runs may take, all together.
        longest_trained: tokens of the longest sequence that trains; 0 where none does.
        longest_kept: the longest whose layers are computed once.
        pass_bytes: one pass over as long a sequence as was asked for, or else over the longest.
        pass_tokens: tokens of that pass.
        least_pass_bytes: a pass of one token.
        cache_bytes: KV cache of ``cache_tokens``.
        longest_sampled: tokens of the longest sequence that is sampled beside the weights; 0 where none is.
    """

    weights_bytes: int
    pass_limit_bytes: int
    kept_limit_bytes: int
    run_limit_bytes: int
    longest_trained: int
    longest_kept: int
    pass_bytes: int
    pass_tokens: int
    least_pass_bytes: int
    cache_bytes: int
    cache_tokens: int
    longest_sampled: int


class Fit(msgspec.Struct, frozen=True, kw_only=True):
    """A base model on a device.

    Args:
        model_type: as ``config.json`` names it.
        backend: what would compute it, by name; ``passed_over``: why those before it do not.
        device: where, and ``dtype``: in what; ``base_dtype``: what the base weights of its layers are kept in.
        memory_bytes: of the device, as far as it may be taken.
        num_parameters: a tied output layer counted once.
        stored_bytes: of the weight files; None where there are none.
        quantization: how they are quantised there, in words; empty where they are plain.
        weights_bytes: as loaded, in the compute type where they are not kept in fewer bits.
        context: positions that it is made for.
        rank: of the run, and ``adapter_parameters`` its trained numbers.
        adapted: names of the modules that take adapters.
        frozen: share of the layers' weights that takes none.
        plan: None where only the loaded model tells.
    """

    model_type: str
    backend: str
    passed_over: dict[str, str]
    device: str
    dtype: str
    base_dtype: str
    memory_bytes: int
    num_parameters: int
    stored_bytes: int | None
    quantization: str
    weights_bytes: int
    context: int
    rank: int
    adapter_parameters: int
    adapted: list[str]
    frozen: float
    plan: PassPlan | None


class FitAnswer(msgspec.Struct, frozen=True):
    """Of one model: what fits, or why that cannot be said."""

    fit: Fit | None = None
    error: str = ""
