"""Keys and values in fixed pages, which samples of one prompt share and which stay as long as there is room."""

from collections.abc import Callable
from typing import Protocol

PAGE_TOKENS = 16
NULL_PAGE = 0


class PageStorage(Protocol):
    """What is in the pages: a backend's own."""

    @property
    def num_pages(self) -> int:
        """The null page included."""
        ...

    def zero(self, pages: list[int]) -> None:
        """Clear pages before their first token is written: a masked NaN would still be a NaN."""
        ...

    def copy_page(self, source: int, target: int) -> None: ...


class PagePool:
    """Pages of ``PAGE_TOKENS`` tokens over all layers, counted by reference.

    Page 0 is never given out: it stays zero and pads page tables. A page that nobody but the prefix cache refers to
    is idle: it counts as available, as the cache gives it back when the free ones run out.
    """

    def __init__(self, storage: PageStorage) -> None:
        self._storage = storage
        self.num_pages = storage.num_pages - 1
        self._free = list(range(self.num_pages, 0, -1))
        self._references = [0] * (self.num_pages + 1)
        self._cached: set[int] = set()
        self._num_idle = 0
        self._reclaim: Callable[[int], None] | None = None
        storage.zero([NULL_PAGE])

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that can be had: free ones and idle ones."""
        return len(self._free) + self._num_idle

    def reclaim_with(self, reclaim: Callable[[int], None]) -> None:
        """Whom to ask for that many idle pages when the free ones run out."""
        self._reclaim = reclaim

    def allocate(self, num: int) -> list[int]:
        """Take ``num`` pages, each with one reference."""
        assert num <= self.num_available, "the scheduler must ask for room first"
        if num > self.num_free and self._reclaim is not None:
            self._reclaim(num - self.num_free)
        assert num <= self.num_free, "an idle page was not given back"
        pages = [self._free.pop() for _ in range(num)]
        for page in pages:
            self._references[page] = 1
        return pages

    def share(self, pages: list[int]) -> None:
        """One more reference to each."""
        for page in pages:
            assert self._references[page] > 0, "a free page cannot be shared"
            self._num_idle -= self.is_idle(page)
            self._references[page] += 1

    def release(self, pages: list[int]) -> None:
        """One reference less; the last one frees the page."""
        for page in pages:
            assert self._references[page] > 0, "page released twice"
            self._references[page] -= 1
            self._num_idle += self.is_idle(page)
            if self._references[page] == 0:
                self._free.append(page)

    def is_idle(self, page: int) -> bool:
        """Whether only the prefix cache refers to it."""
        return page in self._cached and self._references[page] == 1

    def keep(self, page: int) -> None:
        """The prefix cache takes a reference to a page that somebody uses."""
        assert page not in self._cached, "a page is cached once"
        self.share([page])
        self._cached.add(page)

    def give_up(self, page: int) -> None:
        """The prefix cache lets go of an idle page."""
        assert self.is_idle(page), "a page in use stays cached"
        self._num_idle -= 1
        self._cached.remove(page)
        self.release([page])

    def check_integrity(self) -> None:
        """Every page is either free or referenced, never both; cached pages are referenced."""
        assert len(set(self._free)) == len(self._free), "a page is free twice"
        held = {page for page in range(1, self.num_pages + 1) if self._references[page] > 0}
        assert held.isdisjoint(self._free), "a page is both held and free"
        assert len(held) + len(self._free) == self.num_pages, "a page is lost"
        assert self._cached <= held, "a cached page is free"
        assert self._num_idle == sum(self.is_idle(page) for page in self._cached), "idle pages are miscounted"

    def copy_page(self, source: int, target: int) -> None:
        self._storage.copy_page(source, target)


def pages_for(num_tokens: int) -> int:
    """Pages that hold ``num_tokens``."""
    return -(-num_tokens // PAGE_TOKENS)


def storage_pages(num_tokens: int) -> int:
    """Pages of a pool that holds ``num_tokens``, the null page included."""
    return pages_for(num_tokens) + 1
