"""A Hugging Face ``config.json``, read with every number checked: what the families' files make a spec of."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfloop.engine.models.rope import RopeConfig, parse_rope
from selfloop.engine.models.spec import Activation, Block, DenseMlp, FullAttention, LayerSpec, ModelSpec, Norm
from selfloop.types.errors import BadRequest, model_invalid
from selfloop.types.model_folder import TIED_UNLESS_SAID
from selfloop.types.quantization import parse_quantization
from selfloop.types.transformers_models import context_of

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Of one tensor's side; what is beyond is no model but an attempt to take the memory.
_MAX_SIZE = 2**31
_MAX_LAYERS = 2**16
_ACTIVATIONS: dict[Any, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class HfConfig:
    """The keys that several families read alike. Every method raises OperationFailed for what is not supported."""

    def __init__(self, raw: Mapping[str, Any], generation: Mapping[str, Any]) -> None:
        self.raw = raw
        self._generation = generation
        missing = [name for name in _REQUIRED if name not in raw]
        if missing:
            raise model_invalid(f"config.json lacks {missing}")
        self._sizes = {name: read_size(name, raw[name]) for name in _REQUIRED}
        _refuse_unsupported(raw)

    @property
    def num_layers(self) -> int:
        num = self._sizes["num_hidden_layers"]
        if num > _MAX_LAYERS:
            raise model_invalid(f"config.json: num_hidden_layers must be at most {_MAX_LAYERS}, is {num}")
        return num

    def flag(self, name: str) -> bool:
        """False where it is absent."""
        return bool(self.raw.get(name, False))

    def size(self, *names: str, default: int | None = None) -> int:
        """The first of these keys that is there, a positive integer; ``default`` where there is none."""
        found = next((name for name in names if name in self.raw), None)
        if found is None and default is not None:
            return default
        if found is None:
            raise model_invalid(f"config.json lacks {[names[0]]}")
        return read_size(found, self.raw[found])

    def window(self, default: int | None = None) -> int | None:
        """``sliding_window``, ``default`` where it is absent; None where every layer sees the whole context."""
        window = self.raw.get("sliding_window", default)
        if window is None or read_size("sliding_window", window) >= self._sizes["max_position_embeddings"]:
            return None
        return window

    def windows(self, window: int | None, default_types: Sequence[str]) -> list[int | None]:
        """Of each layer: ``window`` where ``layer_types`` says that it slides.

        Args:
            default_types: of each layer, where the config has no such key.
        """
        types = self.layer_types(("full_attention", "sliding_attention"), default_types)
        return [window if kind == "sliding_attention" else None for kind in types]

    def layer_types(self, known: Sequence[str], default: Sequence[str]) -> list[str]:
        """One of ``known`` for each layer, ``default`` where the config has no such key."""
        types: Any = self.raw.get("layer_types")
        types = list(default) if types is None else types
        if not isinstance(types, list) or len(types) != self.num_layers or not set(known).issuperset(types):
            raise model_invalid(
                f"config.json: layer_types must have one of {sorted(known)} for each of the {self.num_layers} "
                f"layers, is {types!r}"
            )
        return types

    def qwen_windows(self) -> list[int | None]:
        """Of each layer of a Qwen config, whose first ``max_window_layers`` have none."""
        window = self.window(4096) if self.flag("use_sliding_window") else None
        num_full = self.size("max_window_layers", default=28) if window is not None else self.num_layers
        types = ["full_attention" if index < num_full else "sliding_attention" for index in range(self.num_layers)]
        return self.windows(window, types)

    def attention(
        self,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
    ) -> FullAttention:
        """``num_kv_heads`` and ``head_dim`` are what transformers takes where the config has no such key; None: what
        follows from the other sizes, which an explicit null asks for, too."""
        num_heads = self._sizes["num_attention_heads"]
        raw_kv, raw_dim = self.raw.get("num_key_value_heads", num_kv_heads), self.raw.get("head_dim", head_dim)
        kv_heads = num_heads if raw_kv is None else read_size("num_key_value_heads", raw_kv)
        dim = self._sizes["hidden_size"] // num_heads if raw_dim is None else read_size("head_dim", raw_dim)
        if num_heads % kv_heads != 0:
            raise model_invalid(f"num_attention_heads {num_heads} is no multiple of num_key_value_heads {kv_heads}")
        if dim < 2 or dim % 2 != 0:
            raise model_invalid(f"heads of {dim} dimensions cannot be rotated; an even number is needed")
        eps = self.eps if qk_norm else None
        return FullAttention(self._sizes["hidden_size"], num_heads, kv_heads, dim, qkv_bias, o_bias, eps)

    def mlp(self, *, bias: bool = False) -> DenseMlp:
        activation = self.activation("hidden_act", "silu")
        return DenseMlp(self._sizes["hidden_size"], self.size("intermediate_size"), bias, activation)

    def activation(self, name: str, default: str) -> Activation:
        """What the key of that name says, ``default`` where it is absent."""
        value = self.raw.get(name, default)
        if value not in _ACTIVATIONS:
            raise model_invalid(f"{name} {value!r} is not supported; known: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[value]

    def number(self, name: str, default: float) -> float:
        """At least 0; ``default`` where the key is absent."""
        return _number(name, self.raw.get(name, default))

    def cap(self, name: str, default: float | None) -> float | None:
        """A positive number; ``default`` where the key is absent, None for null."""
        value = self.raw.get(name, default)
        if value is None:
            return None
        if _number(name, value) == 0:
            raise model_invalid(f"config.json: {name} must be above 0, is {value!r}")
        return float(value)

    def norms(self) -> tuple[Norm, Norm]:
        return self.norm("input_layernorm"), self.norm("post_attention_layernorm")

    def norm(self, name: str, *, plus_one: bool = False) -> Norm:
        return Norm(name, self._sizes["hidden_size"], self.eps, plus_one)

    def partial_rope(self, head_dim: int, default: float, renamed: Mapping[str, str] | None = None) -> RopeConfig:
        """Of a part of each head, ``default`` where the config does not say which; ``renamed`` as in parse_rope."""
        return _parsed(self.raw, head_dim, partial=default, renamed=renamed)

    def rope_sections(self, default: tuple[int, ...]) -> tuple[int, ...]:
        """``mrope_section``: pairs of dimensions that are rotated by time, row and column of an image's tokens."""
        raw: Any = self.raw.get("rope_scaling") or self.raw.get("rope_parameters") or {}
        given: Any = raw.get("mrope_section", default) if isinstance(raw, dict) else default
        if not isinstance(given, list | tuple) or len(given) != 3:
            raise model_invalid(f"config.json: mrope_section must be three numbers, is {given!r}")
        return tuple(read_size("mrope_section", number) for number in given)

    def rope_of(self, kind: str, head_dim: int, base: str, default_base: float) -> RopeConfig:
        """That of one kind of layers, where full and sliding ones have each their own.

        transformers 5 has ``rope_parameters`` of each kind; before, ``rope_scaling`` was that of the full ones.

        Args:
            base: the key of its base in older configs.
        """
        of_kinds: Any = self.raw.get("rope_parameters")
        own: Any = of_kinds.get(kind) if isinstance(of_kinds, dict) else None
        scaling: Any = self.raw.get("rope_scaling") if kind == "full_attention" else None
        parameters = {"rope_theta": self.raw.get(base, default_base), **(own or {}), **(scaling or {})}
        positions = {"max_position_embeddings": self._sizes["max_position_embeddings"]}
        return _parsed({**positions, "rope_parameters": parameters}, head_dim)

    def dense(self, attention: FullAttention, mlp: DenseMlp) -> ModelSpec:
        """All layers alike."""
        return self.decoder([attention] * self.num_layers, mlp)

    def decoder(
        self,
        attentions: Sequence[FullAttention],
        mlp: DenseMlp,
        norms: tuple[Norm | None, Norm | None] | None = None,
        post_norms: tuple[Norm | None, Norm | None] = (None, None),
        *,
        rope: RopeConfig | None = None,
    ) -> ModelSpec:
        """A layer for each of ``attentions``; ``norms`` None are those of Llama, ``rope`` None is as in Llama."""
        before = self.norms() if norms is None else norms
        layers = {attention: LayerSpec(attention, mlp, before, post_norms) for attention in attentions}
        return self.model([layers[attention] for attention in attentions], attentions[0].head_dim, rope)

    def routed(self, attentions: Sequence[FullAttention], experts: Block, rope: RopeConfig | None = None) -> ModelSpec:
        """A layer for each of ``attentions``, with the feed-forward of :meth:`feed_forwards`; ``rope`` as in
        :meth:`model`."""
        each = zip(attentions, self.feed_forwards(experts), strict=True)
        layers = [LayerSpec(attention, feed_forward, self.norms()) for attention, feed_forward in each]
        return self.model(layers, attentions[0].head_dim, rope)

    def feed_forwards(self, experts: Block) -> list[Block]:
        """Of each layer: ``experts`` where no key of Qwen's says that it has a dense MLP."""
        dense, step = self.raw.get("mlp_only_layers") or (), self.size("decoder_sparse_step", default=1)
        return [self.mlp() if index in dense or (index + 1) % step else experts for index in range(self.num_layers)]

    def model(self, layers: Sequence[LayerSpec], rotated_dim: int, rope: RopeConfig | None = None) -> ModelSpec:
        """``rotated_dim``: dimensions of a head, all of which are rotated, if no ``rope`` says other."""
        if (
            any(layer.feed_forward.kind != DenseMlp.kind for layer in layers)
            and self.activation("hidden_act", "silu") != "silu"
        ):
            raise model_invalid(f"hidden_act {self.raw['hidden_act']!r} is not supported of experts; only silu is")
        generated_ends, own_ends = end_tokens(self._generation), end_tokens(self.raw)
        return ModelSpec(
            model_type=self.raw["model_type"],
            vocab_size=self._sizes["vocab_size"],
            hidden_size=self._sizes["hidden_size"],
            layers=tuple(layers),
            final_norm_eps=self.eps,
            tied=bool(self.raw.get("tie_word_embeddings", self.raw["model_type"] in TIED_UNLESS_SAID)),
            rope=_parsed(self.raw, rotated_dim) if rope is None else rope,
            context=context_of(self.raw) or self._sizes["max_position_embeddings"],
            eos_token_ids=generated_ends or own_ends,
        )

    def layers_behind(self) -> tuple[str, ...]:
        """What the tensors of layers begin with that guess more than the next token, behind those of the model."""
        num = self.raw.get("num_nextn_predict_layers", 1) or 0
        num = num if isinstance(num, int) else 1
        return tuple(f"model.layers.{self.num_layers + index}." for index in range(num))

    @property
    def eps(self) -> float:
        return _number("rms_norm_eps", self.raw.get("rms_norm_eps", 1e-6))


def _parsed(
    raw: Mapping[str, Any], head_dim: int, partial: float | None = None, renamed: Mapping[str, str] | None = None
) -> RopeConfig:
    try:
        return parse_rope(raw, head_dim, partial=partial, renamed=renamed)
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise model_invalid(f"config.json: the rope parameters cannot be read: {error}") from error


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; raises OperationFailed where the file holds none."""
    try:
        raw: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise model_invalid(f"{path} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise model_invalid(f"{path} cannot be read: it holds no object")
    return raw


def read_size(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
        raise model_invalid(f"config.json: {name} must be a positive integer, is {value!r}")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise model_invalid(f"config.json: {name} must be a number of at least 0, is {value!r}")
    return float(value)


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    check_quantization(raw)
    if raw.get("transformers_weights") is not None:
        raise model_invalid(f"transformers_weights {raw['transformers_weights']!r} is not supported")


def check_quantization(raw: Mapping[str, Any]) -> None:
    """Refuse quantised weights of a format that is not read here, by name."""
    try:
        parse_quantization(raw.get("quantization_config"))
    except BadRequest as error:
        raise model_invalid(error.expected) from error


def end_tokens(raw: Mapping[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    if value is None:
        return ()
    ids: list[Any] = value if isinstance(value, list) else [value]
    if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise model_invalid(f"eos_token_id must be a token id or a list of them, is {value!r}")
    return tuple(ids)
