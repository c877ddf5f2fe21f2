"""Pages of keys and values that are kept after use, found again by the weights and the tokens that made them.

Of a model with recurrent states, pages are of use only up to where a copy of the states was kept, too.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

from selfloop.engine.backends.base import CacheSlot
from selfloop.engine.kv.pages import PAGE_TOKENS, PagePool
from selfloop.engine.lora.adapter import Adapter


@dataclass(slots=True, eq=False)
class _Node:
    """A full page that follows its parent's."""

    parent: "_Node | None" = None
    tokens: tuple[int, ...] = ()
    page: int = 0
    states: CacheSlot | None = None
    children: dict[tuple[int, ...], "_Node"] = field(default_factory=dict[tuple[int, ...], "_Node"])


class Found(NamedTuple):
    """What of a prompt is cached: pages, each shared once, and the place of the states behind them."""

    pages: list[int]
    states: CacheSlot | None


@dataclass(frozen=True, slots=True)
class KeptStates:
    """How copies of recurrent states are kept: ``most`` of them, each let go of by ``drop``."""

    most: int
    drop: Callable[[CacheSlot], None]


class PrefixCache:
    """A tree of full pages for each version of the weights; the longest unused leave first, and ends before beginnings.

    An adapter in the engine's bank is frozen, so the object is the version: new weights are another object and never
    meet these pages. Those of an adapter that is gone are found by nobody and leave in their turn.

    Args:
        kept: of a model with recurrent states; None for one whose pages say all.
    """

    def __init__(self, pool: PagePool, kept: KeptStates | None = None) -> None:
        self._pool = pool
        self._kept = kept
        # Nodes with states, the longest unused first.
        self._with_states: OrderedDict[_Node, None] = OrderedDict()
        self._base = _Node()
        self._adapted: WeakKeyDictionary[Adapter, _Node] = WeakKeyDictionary()
        # Every page stands before the one it follows, as a path is touched from its end.
        self._order: OrderedDict[_Node, None] = OrderedDict()
        pool.reclaim_with(self._reclaim)

    @property
    def num_states(self) -> int:
        """Copies of states that it keeps."""
        return len(self._with_states)

    def match(self, adapter: Adapter | None, tokens: list[int]) -> Found:
        """The longest run of cached pages that ``tokens`` begins with, short of the last token.

        Where states are kept, it ends with some; they are to be copied before anything else is inserted.
        """
        path = self._path(adapter, tokens, (len(tokens) - 1) // PAGE_TOKENS)
        if self._kept is not None:
            while path and path[-1].states is None:
                path.pop()
        self._touch(path)
        pages = [node.page for node in path]
        self._pool.share(pages)
        return Found(pages, path[-1].states if path else None)

    def insert(
        self, adapter: Adapter | None, tokens: list[int], pages: list[int], states: CacheSlot | None = None
    ) -> None:
        """Keep the pages that are full of ``tokens``. The caller's references stay its own to release.

        ``states``, those behind ``tokens``, whose number is one of whole pages, are its own from here on.

        Where equal pages are cached already, the caller gets those in the place of its own: so whoever uses a page
        uses all that come before it, and an idle page has no busy one after it.
        """
        num = len(tokens) // PAGE_TOKENS
        path = self._path(adapter, tokens, num)
        for index, node in enumerate(path):
            self._pool.share([node.page])
            self._pool.release([pages[index]])
            pages[index] = node.page
        node = path[-1] if path else self._root(adapter)
        for index in range(len(path), num):
            key = _key(tokens, index)
            child = _Node(node, key, pages[index])
            self._pool.keep(child.page)
            node.children[key] = child
            path.append(child)
            node = child
        if states is not None:
            self._keep_states(node, states)
        self._touch(path)

    def clear(self) -> None:
        """Give up every idle page."""
        self._reclaim(len(self._order))

    def _root(self, adapter: Adapter | None) -> _Node:
        if adapter is None:
            return self._base
        if adapter not in self._adapted:
            self._adapted[adapter] = _Node()
        return self._adapted[adapter]

    def _path(self, adapter: Adapter | None, tokens: list[int], max_pages: int) -> list[_Node]:
        node, path = self._root(adapter), list[_Node]()
        for index in range(max_pages):
            child = node.children.get(_key(tokens, index))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def _touch(self, path: list[_Node]) -> None:
        for node in reversed(path):
            self._order[node] = None
            self._order.move_to_end(node)
        if path and path[-1].states is not None:
            self._with_states.move_to_end(path[-1])

    def _keep_states(self, node: _Node, states: CacheSlot) -> None:
        assert self._kept is not None, "states are kept of a model that has some"
        assert node.parent is not None, "states are kept behind a page"
        if node.states is not None:
            self._kept.drop(states)
            return
        node.states = states
        self._with_states[node] = None
        if len(self._with_states) > self._kept.most:
            self._drop_states(next(iter(self._with_states)))

    def _drop_states(self, node: _Node) -> None:
        if self._kept is not None and node.states is not None:
            self._kept.drop(node.states)
            del self._with_states[node]
            node.states = None

    def _reclaim(self, num: int) -> None:
        given: list[_Node] = []
        for node in self._order:
            if len(given) == num:
                break
            if self._pool.is_idle(node.page):
                given.append(node)
        for node in given:
            assert not node.children, "what follows a page leaves before it"
            del self._order[node]
            self._drop_states(node)
            assert node.parent is not None
            del node.parent.children[node.tokens]
            self._pool.give_up(node.page)


def _key(tokens: list[int], index: int) -> tuple[int, ...]:
    return tuple(tokens[index * PAGE_TOKENS : (index + 1) * PAGE_TOKENS])
