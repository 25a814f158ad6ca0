"""`PagePool`: who holds which page of keys and values, and which pages can be reused by content.

PagedAttention (arXiv:2309.06180) with automatic prefix reuse: a full page is known by a digest of its tokens and of
everything before them, so equal digests mean equal keys and values. A page that nobody holds stays findable until its
place is needed; the one unused for longest goes first. Plain Python over ints: the bytes live in the stages.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from hashlib import blake2b


def root_digest(salt: str = "") -> bytes:
    """The parent of a sequence's first page; sequences with different salts never share."""
    return blake2b(salt.encode(), digest_size=16).digest()


def page_digest(parent: bytes, token_ids: Seq[int]) -> bytes:
    """128 bits of BLAKE2b over the parent's digest and the page's tokens: not to be forged by a prompt's author."""
    return blake2b(parent + array("i", token_ids).tobytes(), digest_size=16).digest()


class PagePool:
    """Reference-counted pages 0 .. n_pages-1.

    A page is free, held (references > 0), or kept: held by nobody, but findable by its digest.
    """

    def __init__(self, n_pages: int) -> None:
        assert n_pages > 0
        self.n_pages = n_pages
        self.references = [0] * n_pages
        # a stack, lowest page on top: pages that were touched before are taken before fresh memory
        self._free = list(range(n_pages - 1, -1, -1))
        self._kept: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._digest_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def n_available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + len(self._kept)

    @property
    def n_free(self) -> int:
        """Pages that nobody holds and that hold nothing to be found."""
        return len(self._free)

    @property
    def n_kept(self) -> int:
        return len(self._kept)

    @property
    def n_held(self) -> int:
        return self.n_pages - len(self._free) - len(self._kept)

    def allocate(self) -> int:
        """One page with one reference; forgets the page unused for longest if none is free."""
        if self._free:
            page = self._free.pop()
        else:
            assert self._kept, "allocate from an empty pool"
            page, _ = self._kept.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        self.references[page] = 1
        return page

    def share(self, page: int) -> None:
        """One more reference to a held or kept page."""
        if self.references[page] == 0:
            del self._kept[page]
        self.references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Take one reference off each; a sequence's last page comes first, as it is the least likely to be reused."""
        for page in pages:
            assert self.references[page] > 0, f"page {page} is released twice"
            self.references[page] -= 1
            if self.references[page] == 0:
                if page in self._digest_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def remember(self, page: int, digest: bytes) -> None:
        """Make a full, computed page findable; a second page of the same content stays unknown."""
        assert self.references[page] > 0
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def find(self, digests: Iterable[bytes]) -> list[int]:
        """The pages of the longest known prefix; takes no references."""
        pages: list[int] = []
        for digest in digests:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def n_kept_among(self, pages: Iterable[int]) -> int:
        """How many of these distinct pages nobody holds: sharing them makes the pool so much smaller."""
        return sum(1 for page in pages if self.references[page] == 0)

    def check(self, held: Iterable[int] | None = None) -> None:
        """Assert that the books balance; `held` lists every reference that the pool's users know of."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & self._kept.keys(), "a page is both free and kept"
        for page, count in enumerate(self.references):
            idle = page in free or page in self._kept
            assert count >= 0 and (count == 0) == idle, f"page {page} has {count} references and idle is {idle}"
        assert not free & self._digest_of.keys(), "a free page is findable"
        assert self._kept.keys() <= self._digest_of.keys(), "a kept page is not findable"
        assert len(self._page_of) == len(self._digest_of)
        assert all(self._digest_of[page] == digest for digest, page in self._page_of.items())
        if held is not None:
            counts = Counter(held)
            assert all(counts[page] == count for page, count in enumerate(self.references)), "references leak"
