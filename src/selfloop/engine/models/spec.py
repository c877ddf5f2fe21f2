"""What a model is, as data: a family's file makes it of a ``config.json``, and all else is derived from it.

Which tensors are loaded under which names, where adapters go and what they are called, sizes, and what a cache holds:
nothing of that is written a second time. A block is a frozen dataclass with what :class:`Block` asks; a backend that
computes it has a file of the block's ``kind``.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple, Protocol

from selfloop.engine.models.rope import RopeConfig
from selfloop.types.model_weights import EMBEDDING, HEAD

Shapes = dict[str, tuple[int, ...]]
"""Tensors by name."""

HEAD_MODULE = "lm_head"
"""Name of the output layer, which belongs to no layer of the decoder."""

SINKS = "self_attn.sinks"
"""Name of the scores, one a head, that belong to no key."""

FINAL_NORM = "model.norm"
"""Path of the norm behind the last layer."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A matrix W (out, in) of a layer.

    Args:
        name: its module's path inside the layer, as the checkpoint and PEFT have it.
        shard: which side of W is dealt to the ranks of a tensor-parallel group.
        adaptable: whether an adapter may be added to it.
    """

    name: str
    in_features: int
    out_features: int
    shard: Literal["out", "in"]
    bias: bool = False
    adaptable: bool = True

    @property
    def short_name(self) -> str:
        """The last part, by which PEFT's ``target_modules`` names it."""
        return self.name.rpartition(".")[2]

    def tensors(self) -> Shapes:
        shapes: Shapes = {f"{self.name}.weight": (self.out_features, self.in_features)}
        if self.bias:
            shapes[f"{self.name}.bias"] = (self.out_features,)
        return shapes


@dataclass(frozen=True, slots=True)
class ProjectionGroup:
    """Projections that read the same input, held as one matrix, with the A of their adapters side by side.

    Args:
        projections: with ``num_experts``, those of the first expert, then those of the next, all of one shape.
        num_experts: of a mixture, each with such a matrix of its own; None where there is one.
    """

    projections: tuple[Projection, ...]
    num_experts: int | None = None

    @property
    def fused(self) -> tuple[Projection, ...]:
        """What one matrix is of: all, or those of the first expert."""
        return self.projections[: len(self.projections) // (self.num_experts or 1)]

    @property
    def in_features(self) -> int:
        return self.projections[0].in_features

    @property
    def out_sizes(self) -> list[int]:
        return [projection.out_features for projection in self.fused]

    @property
    def bias(self) -> bool:
        return self.projections[0].bias


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """What a mixer keeps of a sequence in one layer.

    Args:
        kind: ``pages``: of every token; ``window``: of the last ones; ``state``: a state of one size.
        num_elements: of each token, or of the state.
    """

    kind: Literal["pages", "window", "state"]
    num_elements: int


class Block(Protocol):
    """A mixer or a feed-forward; names are inside its layer."""

    kind: ClassVar[str]
    """Name of the file in which a backend computes it."""

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        """Its adaptable projections."""
        ...

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All of them, those that take no adapter included."""
        ...

    @property
    def num_active_weights(self) -> int:
        """Elements of the matrices that a token is multiplied by."""
        ...

    def tensors(self) -> Shapes:
        """Everything that the checkpoint has of it."""
        ...

    @property
    def cache(self) -> CacheSpec | None: ...


RopeName = Literal["model", "local"]
"""``rope`` or ``local_rope`` of a :class:`ModelSpec`."""
Activation = Literal["silu", "gelu_tanh"]
"""Of the gate of an MLP; ``gelu_tanh`` is the approximation of GELU by tanh."""


@dataclass(frozen=True, slots=True)
class FullAttention:
    """Attention of each token to those up to itself, with heads that share keys.

    Args:
        qk_norm_eps: of the RMSNorm of every head of q and k; None is without.
        window: how many tokens each sees, itself the last; None for all.
        rope: what rotates q and k; None leaves them as they are.
        scale: of the scores; None is head_dim^-1/2.
        softcap: scores s become c * tanh(s / c); None leaves them as they are.
        norm_plus_one: whether the norms of q and k multiply by 1 + w.
        norm_over_heads: whether those norms are of all heads together.
        interleaved: whether dimension 2i is rotated with 2i + 1, and not i with i + d/2 of the d that are rotated.
        fused: whether q, k and v are one matrix in the checkpoint, ``qkv_proj``; an adapter is then on that.
        gated: whether ``q_proj`` gives every head a gate behind its q, whose sigmoid the head's output is multiplied
            by.
        sinks: whether every head has a score besides those of the keys, which takes its part of the softmax and gives
            nothing (Xiao et al. 2023, https://arxiv.org/abs/2309.17453, section 3.3).
    """

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm_eps: float | None = None
    window: int | None = None
    rope: RopeName | None = "model"
    scale: float | None = None
    softcap: float | None = None
    norm_plus_one: bool = False
    norm_over_heads: bool = False
    interleaved: bool = False
    fused: bool = False
    gated: bool = False
    sinks: bool = False

    kind: ClassVar[str] = "full_attention"

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        heads, kv_heads = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        sizes = {"q_proj": 2 * heads if self.gated else heads, "k_proj": kv_heads, "v_proj": kv_heads}
        if self.fused:
            sizes = {"qkv_proj": heads + 2 * kv_heads}
        qkv = [Projection(f"self_attn.{n}", self.hidden_size, size, "out", self.qkv_bias) for n, size in sizes.items()]
        out = Projection("self_attn.o_proj", heads, self.hidden_size, "in", self.o_bias)
        return ProjectionGroup(tuple(qkv)), ProjectionGroup((out,))

    @property
    def projections(self) -> tuple[Projection, ...]:
        return _flat(self.groups)

    @property
    def num_active_weights(self) -> int:
        return sum(projection.in_features * projection.out_features for projection in self.projections)

    def tensors(self) -> Shapes:
        shapes = _tensors(self.projections)
        if self.qk_norm_eps is not None:
            q, k = (self.num_heads, self.num_kv_heads) if self.norm_over_heads else (1, 1)
            shapes |= {f"self_attn.{n}_norm.weight": (m * self.head_dim,) for n, m in (("q", q), ("k", k))}
        if self.sinks:
            shapes[SINKS] = (self.num_heads,)
        return shapes

    @property
    def is_plain(self) -> bool:
        """Whether the softmax is of scaled products with all keys, and of nothing else."""
        return self.window is None and self.softcap is None and not self.sinks

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def cache(self) -> CacheSpec:
        return CacheSpec("pages", 2 * self.num_kv_heads * self.head_dim)


@dataclass(frozen=True, slots=True)
class DenseMlp:
    """down(act(gate(x)) * up(x)); ``fused``: gate and up are one matrix in the checkpoint, ``gate_up_proj``."""

    hidden_size: int
    inner_size: int
    bias: bool = False
    activation: Activation = "silu"
    fused: bool = False

    kind: ClassVar[str] = "dense_mlp"

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        hidden, inner = self.hidden_size, self.inner_size
        sizes = {"gate_up_proj": 2 * inner} if self.fused else {"gate_proj": inner, "up_proj": inner}
        gate_up = [Projection(f"mlp.{name}", hidden, size, "out", self.bias) for name, size in sizes.items()]
        down = Projection("mlp.down_proj", inner, hidden, "in", self.bias)
        return ProjectionGroup(tuple(gate_up)), ProjectionGroup((down,))

    @property
    def projections(self) -> tuple[Projection, ...]:
        return _flat(self.groups)

    @property
    def num_active_weights(self) -> int:
        return sum(projection.in_features * projection.out_features for projection in self.projections)

    def tensors(self) -> Shapes:
        return _tensors(self.projections)

    @property
    def cache(self) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm; ``name`` is its module's path inside the layer. With ``plus_one`` it multiplies by 1 + w."""

    name: str
    size: int
    eps: float
    plus_one: bool = False


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """h + c * norm(mixer(norm(h))), then h + c * norm(feed_forward(norm(h))).

    Args:
        residual_scale: c.
        norms: before the one and before the other; None is none.
        post_norms: behind each of them.
    """

    mixer: Block
    feed_forward: Block
    norms: tuple[Norm | None, ...]
    post_norms: tuple[Norm | None, ...] = (None, None)
    residual_scale: float = 1.0

    @property
    def groups(self) -> tuple[ProjectionGroup, ...]:
        """Those of the mixer, then those of the feed-forward: the order of an adapter's layer."""
        return (*self.mixer.groups, *self.feed_forward.groups)

    def tensors(self) -> Shapes:
        both = (*self.norms, *self.post_norms)
        norms: Shapes = {f"{norm.name}.weight": (norm.size,) for norm in both if norm is not None}
        return norms | self.mixer.tensors() | self.feed_forward.tensors()


@dataclass(frozen=True)
class ModelSpec:
    """A causal language model.

    Args:
        model_type: the family, as ``config.json`` names it.
        tied: whether the output layer is the embedding: what the weights say, where they are read.
        context: positions that it is made for.
        eos_token_ids: each ends a sample.
        local_rope: a second rotation, of the layers that name it.
        embedding_scale: embeddings are multiplied by it, in the compute dtype.
        logit_scale: logits are multiplied by it.
        logit_softcap: logits z then become c * tanh(z / c); None leaves them as they are.
        final_norm_plus_one: whether the final norm multiplies by 1 + w.
        left_out: what the names of tensors begin with that a folder may have and the model has not.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm_eps: float
    tied: bool
    rope: RopeConfig
    context: int
    eos_token_ids: tuple[int, ...]
    local_rope: RopeConfig | None = field(default=None, kw_only=True)
    embedding_scale: float = field(default=1.0, kw_only=True)
    logit_scale: float = field(default=1.0, kw_only=True)
    logit_softcap: float | None = field(default=None, kw_only=True)
    final_norm_plus_one: bool = field(default=False, kw_only=True)
    left_out: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def head(self) -> Projection:
        """The output layer."""
        return Projection(HEAD_MODULE, self.hidden_size, self.vocab_size, "out")

    def layer_prefix(self, index: int) -> str:
        """What the names of a layer's tensors begin with."""
        return f"model.layers.{index}."

    def ends(self) -> Shapes:
        """The tensors that belong to no layer."""
        shapes: Shapes = {EMBEDDING: (self.vocab_size, self.hidden_size), f"{FINAL_NORM}.weight": (self.hidden_size,)}
        if not self.tied:
            shapes[HEAD] = (self.vocab_size, self.hidden_size)
        return shapes

    def tensors(self) -> Shapes:
        """Every tensor by name, as Hugging Face checkpoints have it."""
        layers = enumerate(self.layers)
        named = {self.layer_prefix(i) + name: shape for i, layer in layers for name, shape in layer.tensors().items()}
        return self.ends() | named

    @cached_property
    def num_parameters(self) -> int:
        """A tied output layer counted once."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    @property
    def num_linear_weights(self) -> int:
        """Elements of the matrices that a token is multiplied by, the output layer included."""
        layers = sum(layer.mixer.num_active_weights + layer.feed_forward.num_active_weights for layer in self.layers)
        return layers + self.head.in_features * self.head.out_features

    @property
    def cache_elements(self) -> int:
        """Elements that the cache takes for each token, in all layers."""
        caches = [layer.mixer.cache for layer in self.layers]
        return sum(cache.num_elements for cache in caches if cache is not None and cache.kind == "pages")

    @property
    def ropes(self) -> dict[RopeName, RopeConfig]:
        """The rotations that its layers name."""
        return {"model": self.rope} if self.local_rope is None else {"model": self.rope, "local": self.local_rope}

    @property
    def state_elements(self) -> int:
        """Elements that the cache takes for each sequence, however long, in all layers."""
        caches = [layer.mixer.cache for layer in self.layers]
        return sum(cache.num_elements for cache in caches if cache is not None and cache.kind == "state")

    @cached_property
    def cache_places(self) -> tuple[int, ...]:
        """Of each layer, its number among those that keep the like of a sequence."""
        counts: Counter[str] = Counter()
        found: list[int] = []
        for layer in self.layers:
            kind = "none" if layer.mixer.cache is None else layer.mixer.cache.kind
            found.append(counts[kind])
            counts[kind] += 1
        return tuple(found)

    @property
    def attentions(self) -> list[FullAttention]:
        """Of the layers that have one, in their order."""
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, FullAttention)]

    def blocks(self) -> set[str]:
        """The kinds of its blocks."""
        return {block.kind for layer in self.layers for block in (layer.mixer, layer.feed_forward)}


class DenseLayers(NamedTuple):
    """What every layer of a model is, where all are alike."""

    attention: FullAttention
    mlp: DenseMlp
    eps: float


def dense_layers(spec: ModelSpec) -> DenseLayers | None:
    """Where every layer is the same rotary attention to all tokens and a gated MLP, as in Llama, Qwen2 and Qwen3.

    None where :func:`unlike_dense` has anything to say.
    """
    first = spec.layers[0]
    if unlike_dense(spec) or not isinstance(first.mixer, FullAttention) or not isinstance(first.feed_forward, DenseMlp):
        return None
    return DenseLayers(first.mixer, first.feed_forward, spec.final_norm_eps)


def unlike_dense(spec: ModelSpec) -> list[str]:
    """What a model has that those of :func:`dense_layers` have not, in words."""
    mixers = {layer.mixer for layer in spec.layers}
    attentions = {mixer for mixer in mixers if isinstance(mixer, FullAttention)}
    feed_forwards = {layer.feed_forward for layer in spec.layers}
    mlps = {feed_forward for feed_forward in feed_forwards if isinstance(feed_forward, DenseMlp)}
    norms = {norm for layer in spec.layers for norm in layer.norms}
    eps = {norm.eps for norm in norms if norm is not None} | {spec.final_norm_eps}
    eps |= {attention.qk_norm_eps for attention in attentions if attention.qk_norm_eps is not None}
    found = {
        "other blocks than attention and a dense MLP": len(attentions) + len(mlps) < len(mixers | feed_forwards),
        "sliding windows": any(attention.window is not None for attention in attentions),
        "layers without rotation": any(attention.rope is None for attention in attentions),
        "several rotations": spec.local_rope is not None,
        "scores of another scale": any(attention.scale is not None for attention in attentions),
        "soft caps": spec.logit_softcap is not None or any(attention.softcap is not None for attention in attentions),
        "norms of several epsilons": len(eps) > 1,
        "norms of 1 + w": spec.final_norm_plus_one or any(norm is not None and norm.plus_one for norm in norms),
        "norms in other places": any(None in layer.norms or any(layer.post_norms) for layer in spec.layers),
        "factors of embeddings or logits": (spec.embedding_scale, spec.logit_scale) != (1.0, 1.0),
        "factors of residuals": any(layer.residual_scale != 1.0 for layer in spec.layers),
        "norms over all heads": any(attention.norm_over_heads for attention in attentions),
        "sinks": any(attention.sinks for attention in attentions),
        "gates": any(attention.gated for attention in attentions),
        "LongRoPE": spec.rope.kind == "longrope",
        "interleaved rotation": any(attention.interleaved for attention in attentions),
        "partial rotation": any(attention.head_dim != spec.rope.head_dim for attention in attentions),
        "fused projections": any(x.fused for x in (*attentions, *mlps)),
        "other activations than silu": any(mlp.activation != "silu" for mlp in mlps),
    }
    words = [word for word, is_there in found.items() if is_there]
    return words or (["layers of different sizes"] if len(set(spec.layers)) > 1 else [])


def _flat(groups: tuple[ProjectionGroup, ...]) -> tuple[Projection, ...]:
    return tuple(projection for group in groups for projection in group.projections)


def _tensors(projections: tuple[Projection, ...]) -> Shapes:
    return {name: shape for projection in projections for name, shape in projection.tensors().items()}
