"""Pages of keys and values as PyTorch's operators read and write them."""

import torch
from torch import Tensor

from selfloop.engine.kv.pages import NULL_PAGE, PAGE_TOKENS, storage_pages
from selfloop.engine.models.spec import FullAttention


class KvRows:
    """Keys and values of each token in a row."""

    def __init__(
        self, num_layers: int, attention: FullAttention, num_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device = device
        self.num_pages = storage_pages(num_tokens)
        shape = (num_layers, self.num_pages, PAGE_TOKENS, attention.num_kv_heads, attention.head_dim)
        # Untouched memory costs nothing.
        self._k = torch.empty(shape, dtype=dtype, device=device)
        self._v = torch.empty(shape, dtype=dtype, device=device)

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
        self._k[layer].flatten(0, 1).index_copy_(0, cells_N, k_NGd.to(self._k.dtype))
        self._v[layer].flatten(0, 1).index_copy_(0, cells_N, v_NGd.to(self._v.dtype))

    def write_all(self, cells_N: Tensor, kv_LSGNd: Tensor) -> None:
        """Store keys (S = 0) and values (S = 1) of N tokens in all layers."""
        for which, pool in enumerate((self._k, self._v)):
            pool.flatten(1, 2).index_copy_(1, cells_N, kv_LSGNd[:, which].transpose(1, 2).to(pool.dtype))

    def read_all(self, pages: list[int], out_LSGNd: Tensor) -> None:
        """The first N tokens of these pages, in all layers."""
        table_P = torch.tensor(pages, device=self._k.device)
        num = out_LSGNd.shape[3]
        for which, pool in enumerate((self._k, self._v)):
            out_LSGNd[:, which].copy_(pool.index_select(1, table_P).flatten(1, 2)[:, :num].transpose(1, 2))

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
    return torch.tensor([row + [NULL_PAGE] * (width - len(row)) for row in rows], device=device)


def cell(pages: list[int], position: int) -> int:
    """Where a sequence's token at ``position`` lies in the pool."""
    return pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS
