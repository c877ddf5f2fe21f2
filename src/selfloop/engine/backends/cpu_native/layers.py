"""The decoder's layers by the CPU kernels: one call forward, one backward, for all layers and all adapters of a pass.

A row's numbers do not depend on the other rows of a pass, nor on whether it is trained, read as a prompt or drawn.
"""

import ctypes
import weakref
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selfloop.engine.backends.cpu_native import library
from selfloop.engine.backends.cpu_native.adapters import PackedAdapter
from selfloop.engine.backends.cpu_native.library import LANES, PAGE_TOKENS, Kernels
from selfloop.engine.backends.cpu_native.linear import PanelLinear
from selfloop.engine.backends.cpu_native.pass_parts import ALIGN, Part, PassParts, aligned
from selfloop.engine.backends.cpu_native.sizes import Sizes
from selfloop.engine.lora.adapter import Adapter
from selfloop.engine.lora.batch import AdapterBatch, AdapterRows


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows [start, stop) of a pass are a sequence's tokens from ``position`` on, whose cache is ``pages``."""

    start: int
    stop: int
    position: int
    pages: list[int]


class TiledCache:
    """Keys and values in the kernels' pages: (layers, pages, groups, 2, page tokens * head_dim).

    With one layer for a model of several, each layer's replace those of the one before.
    """

    def __init__(self, sizes: Sizes, num_layers: int, num_pages: int, dtype: torch.dtype) -> None:
        shape = (num_layers, num_pages, sizes.num_kv_heads, 2, PAGE_TOKENS * sizes.head_dim)
        self.tiles_LPGSN = torch.empty(shape, dtype=dtype)
        self.layer_stride = self.tiles_LPGSN.stride(0) if num_layers > 1 else 0

    @property
    def num_pages(self) -> int:
        return self.tiles_LPGSN.shape[1]

    def copy_page(self, source: int, target: int) -> None:
        self.tiles_LPGSN[:, target] = self.tiles_LPGSN[:, source]

    def zero(self, pages: list[int]) -> None:
        """Before a page's first token: what is masked is multiplied by zero, and a NaN would stay one."""
        if pages:
            self.tiles_LPGSN[:, pages] = 0


class LayerWeights(NamedTuple):
    """One layer; ``linears`` are q, k and v as one; out; gate and up as one; down."""

    attention_norm_D: Tensor
    mlp_norm_D: Tensor
    qk_norm_Hd: Tensor | None
    linears: tuple[PanelLinear, ...]


class KernelLayers:
    """Layers whose weights lie in panels. Work space is kept between passes and grows with them."""

    def __init__(self, kernels: Kernels, sizes: Sizes, layers: list[LayerWeights], final_norm_D: Tensor) -> None:
        self._kernels = kernels
        self._sizes = sizes
        self._parts = PassParts(kernels, sizes)
        self._weights = layers
        self._norms: list[Tensor] = []
        self._layers = (library.Layer * sizes.num_layers)()
        for to, layer in zip(self._layers, layers, strict=True):
            to.attention_norm, to.mlp_norm = self._float32(layer.attention_norm_D), self._float32(layer.mlp_norm_D)
            if layer.qk_norm_Hd is not None:
                to.qk_norm = self._float32(layer.qk_norm_Hd)
            for linear, given in zip(to.linears, layer.linears, strict=True):
                linear.forward, linear.in_features = given.panels.data.data_ptr(), given.in_features
                linear.out_features = given.out_features
                if given.bias_O is not None:
                    linear.bias = self._float32(given.bias_O)
        self._model = library.Model(
            sizes.num_layers,
            sizes.hidden_size,
            sizes.inner_size,
            sizes.num_heads,
            sizes.num_kv_heads,
            sizes.head_dim,
            sizes.eps,
            self._layers,
            self._float32(final_norm_D),
        )
        self._trains = False
        self._work, self._passing = _Space(), _Space()
        self._spare: list[_Space] = []
        self._own_cache: TiledCache | None = None
        self._packed: weakref.WeakKeyDictionary[Adapter, PackedAdapter] = weakref.WeakKeyDictionary()

    def _float32(self, weight: Tensor) -> int:
        self._norms.append(weight.float().contiguous())
        return self._norms[-1].data_ptr()

    def in_sequences(
        self,
        h_TD: Tensor,
        rotation: tuple[Tensor, Tensor],
        lengths: list[int],
        adapters: AdapterBatch,
        *,
        recompute: bool = False,
    ) -> Tensor:
        """Hidden states after the final norm, in the type of rows, of whole sequences; gradients reach the adapters.

        Args:
            h_TD: float32 embeddings, which are overwritten.
            rotation: cos and sin of each row, as :class:`Rotary` gives them.
            lengths: of the sequences, one after another.
            recompute: keep only what goes into each layer; the backward computes the rest again.
        """
        rows: list[TokenRows] = []
        start = first_page = 0
        for length in lengths:
            num_pages = -(-length // PAGE_TOKENS)
            rows.append(TokenRows(start, start + length, 0, list(range(first_page, first_page + num_pages))))
            start, first_page = start + length, first_page + num_pages
        # One layer's keys and values at a time.
        cache = self._own_cache
        if cache is None or cache.num_pages < first_page:
            cache = self._own_cache = TiledCache(self._sizes, 1, first_page, self._kernels.rows)
        cache.zero([row.pages[-1] for row in rows])
        flats = [row.adapter.flat_P for row in adapters.rows]
        follows = torch.is_grad_enabled() and any(flat_P.requires_grad for flat_P in flats)
        asked = _Asked(h_TD, rotation, rows, cache, adapters.rows, max(lengths) if follows else 0, recompute)
        if not follows:
            return self.forward(asked, self._passing).out_TD
        return _Layers.apply(self, asked, *flats)  # pyright: ignore[reportReturnType]

    def over_cache(
        self,
        h_TD: Tensor,
        rotation: tuple[Tensor, Tensor],
        rows: list[TokenRows],
        cache: TiledCache,
        adapters: AdapterBatch,
    ) -> Tensor:
        """As :meth:`in_sequences`, of tokens whose predecessors are in the cache, which they join. No gradients."""
        return self.forward(_Asked(h_TD, rotation, rows, cache, adapters.rows, 0, False), self._passing).out_TD

    def forward(self, asked: "_Asked", kept: "_Space") -> "_Done":
        """All layers; what a backward needs is left in ``kept``."""
        sizes, num = self._sizes, asked.h_TD.shape[0]
        if asked.longest > 0:
            self._lay_out_backward()
        packed = [self._pack(row.adapter, asked.longest > 0) for row in asked.adapters]
        segments = (library.Segment * len(packed))()
        for segment, row, adapter in zip(segments, asked.adapters, packed, strict=True):
            segment.begin, segment.end = row.start, row.stop
            segment.rank, segment.padded_rank, segment.scaling = adapter.rank, adapter.padded_rank, adapter.scaling
            segment.groups = adapter.table
        tables = [torch.tensor(row.pages, dtype=torch.int32) for row in asked.rows]
        chunks = (library.Chunk * len(tables))()
        for chunk, row, table in zip(chunks, asked.rows, tables, strict=True):
            chunk.begin, chunk.end, chunk.position, chunk.pages = row.start, row.stop, row.position, table.data_ptr()
        cos_Td, sin_Td = (x.float().flatten(1).contiguous() for x in asked.rotation)
        tiles = asked.cache.tiles_LPGSN
        out_TD = torch.empty(num, sizes.hidden_size, dtype=self._kernels.rows)
        on = library.Pass()
        on.model = ctypes.pointer(self._model)
        on.rows, on.num_threads = num, library.num_threads()
        on.segments, on.num_segments = segments, len(segments)
        on.chunks, on.num_chunks = chunks, len(chunks)
        on.h, on.cos, on.sin, on.out = (x.data_ptr() for x in (asked.h_TD, cos_Td, sin_Td, out_TD))
        on.cache, on.page_stride, on.layer_stride = tiles.data_ptr(), tiles.stride(1), asked.cache.layer_stride
        width = max((adapter.padded_rank * adapter.max_parts for adapter in packed), default=LANES)
        self._place_kept(on, asked, width, kept)
        self._place_work(on, asked)
        self._kernels.forward(on)
        return _Done(out_TD, on, (packed, tables, cos_Td, sin_Td))

    def backward(self, done: "_Done", asked: "_Asked", grad_TD: Tensor) -> list[Tensor]:
        """The gradient of each adapter's flat parameters."""
        on = done.on
        self._place_work(on, asked)  # other passes have used it, and may have made it anew
        if asked.recompute:
            asked.cache.zero([row.pages[-1] for row in asked.rows])
        low_TD, h_TD = grad_TD.contiguous(), torch.empty_like(asked.h_TD)
        # The output layer's part, where there is one, gets its gradient elsewhere.
        grads = [
            torch.empty_like(row.adapter.flat_P) if row.adapter.head is None else torch.zeros_like(row.adapter.flat_P)
            for row in asked.adapters
        ]
        on.h, on.d_out = h_TD.data_ptr(), low_TD.data_ptr()
        for number, grad_P in enumerate(grads):
            on.segments[number].grads = grad_P.data_ptr()
        self._kernels.backward(on)
        return grads

    def take_space(self) -> "_Space":
        return self._spare.pop() if self._spare else _Space()

    def give_space(self, space: "_Space") -> None:
        """One is kept: memory that was used before need not be cleared by the system."""
        if not self._spare:
            self._spare.append(space)

    def _lay_out_backward(self) -> None:
        if not self._trains:
            for to, layer in zip(self._layers, self._weights, strict=True):
                for linear, given in zip(to.linears, layer.linears, strict=True):
                    linear.backward = given.backward_panels().data.data_ptr()
            self._trains = True

    def _pack(self, adapter: Adapter, backward: bool) -> PackedAdapter:
        packed = self._packed.get(adapter)
        if packed is None or (backward and not packed.has_backward):
            packed = self._packed[adapter] = PackedAdapter(self._kernels, adapter, backward=backward)
        return packed

    def _place_kept(self, on: library.Pass, asked: "_Asked", width: int, space: "_Space") -> None:
        backward = asked.longest > 0
        on.kept.keeps, on.kept.low_rank_width = int(backward and not asked.recompute), width
        space.place(self._parts.kept(on, backward=backward, recompute=asked.recompute))

    def _place_work(self, on: library.Pass, asked: "_Asked") -> None:
        self._work.place(self._parts.work(on, asked.longest, recompute=asked.recompute))


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layers: KernelLayers, asked: "_Asked", *flats: Tensor) -> Tensor:
        ctx.space = layers.take_space()
        ctx.layers, ctx.asked = layers, asked
        ctx.done = layers.forward(asked, ctx.space)
        return ctx.done.out_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.layers.backward(ctx.done, ctx.asked, grads[0])
        ctx.layers.give_space(ctx.space)
        return None, None, *found


@dataclass(frozen=True, slots=True)
class _Asked:
    """A pass; ``longest`` is the longest sequence of its backward, 0 where there is none."""

    h_TD: Tensor
    rotation: tuple[Tensor, Tensor]
    rows: list[TokenRows]
    cache: TiledCache
    adapters: list[AdapterRows]
    longest: int
    recompute: bool


class _Done(NamedTuple):
    """A pass that went forward; ``holds`` is what its pointers point to."""

    out_TD: Tensor
    on: library.Pass
    holds: object


class _Space:
    """A block of memory that is dealt out in aligned parts."""

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)

    def place(self, parts: list[Part]) -> None:
        """Set every pointer; what was there before is lost."""
        sizes = aligned(parts)
        if self._block.numel() < sum(sizes) + ALIGN:
            self._block = torch.empty(0, dtype=torch.uint8)  # freed before the larger one is taken
            self._block = torch.empty(sum(sizes) + ALIGN, dtype=torch.uint8)
        at = -(-self._block.data_ptr() // ALIGN) * ALIGN
        for (structure, name, _), size in zip(parts, sizes, strict=True):
            setattr(structure, name, at)
            at += size
