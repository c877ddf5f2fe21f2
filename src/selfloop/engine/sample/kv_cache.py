"""Keys and values of active sequences in fixed pages, which samples of one prompt share."""

import torch
from torch import Tensor

from selfloop.engine.models.config import ModelConfig

PAGE_TOKENS = 16
_NULL_PAGE = 0


class PagePool:
    """Pages of ``PAGE_TOKENS`` tokens over all layers, counted by reference.

    Page 0 is never given out: it stays zero and pads page tables.
    """

    def __init__(self, config: ModelConfig, num_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        self.num_pages = -(-num_tokens // PAGE_TOKENS)
        shape = (
            config.num_layers,
            self.num_pages + 1,
            PAGE_TOKENS,
            config.num_kv_heads,
            config.head_dim,
        )
        # Untouched memory costs nothing; a page is zeroed before use, as a masked NaN would still be a NaN.
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty(shape, dtype=dtype, device=device)
        self._free = list(range(self.num_pages, 0, -1))
        self._references = [0] * (self.num_pages + 1)
        self.zero([_NULL_PAGE])

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, num: int) -> list[int]:
        """Take ``num`` pages, each with one reference."""
        assert num <= self.num_free, "the scheduler must ask for room first"
        pages = [self._free.pop() for _ in range(num)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """One more reference to each."""
        for page in pages:
            assert self._references[page] > 0, "a free page cannot be shared"
            self._references[page] += 1

    def release(self, pages: list[int]) -> None:
        """One reference less; the last one frees the page."""
        for page in pages:
            assert self._references[page] > 0, "page released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)

    def check_integrity(self) -> None:
        """Every page is either free or referenced, never both."""
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        held = {page for page in range(1, self.num_pages + 1) if self._references[page] > 0}
        assert held.isdisjoint(self._free), "a page is both held and free"
        assert len(held) + len(self._free) == self.num_pages, "a page is lost"

    def zero(self, pages: list[int]) -> None:
        """Clear pages before their first token is written."""
        for page in pages:
            self._k[:, page] = 0
            self._v[:, page] = 0

    def copy_page(self, source: int, target: int) -> None:
        self._k[:, target] = self._k[:, source]
        self._v[:, target] = self._v[:, source]

    def write(self, layer: int, cells_N: Tensor, k_NGd: Tensor, v_NGd: Tensor) -> None:
        """Store keys and values; cell = page * PAGE_TOKENS + position in page."""
        self._k[layer].flatten(0, 1).index_copy_(0, cells_N, k_NGd)
        self._v[layer].flatten(0, 1).index_copy_(0, cells_N, v_NGd)

    def read(self, layer: int, table_BP: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, G, P * PAGE_TOKENS, head_dim) of page tables padded with page 0."""
        num, width = table_BP.shape
        k, v = (
            pool[layer].index_select(0, table_BP.flatten()).unflatten(0, (num, width)).flatten(1, 2).transpose(1, 2)
            for pool in (self._k, self._v)
        )
        return k, v


def page_table(rows: list[list[int]], device: torch.device) -> Tensor:
    """(B, P) int64, each row padded with the null page."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [_NULL_PAGE] * (width - len(row)) for row in rows], device=device)


def pages_for(num_tokens: int) -> int:
    """Pages that hold ``num_tokens``."""
    return -(-num_tokens // PAGE_TOKENS)


def cell(pages: list[int], position: int) -> int:
    """Where a sequence's token at ``position`` lies in the pool."""
    return pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS
