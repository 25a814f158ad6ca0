"""`PagePool`: who holds which page of keys and values, and which can be reused by content.

PagedAttention (arXiv:2309.06180) with automatic prefix reuse: a full block of a sequence is known by a digest of its
tokens and of everything before them, so equal digests mean equal keys and values. What nobody holds stays findable
until its place is needed; what is unused for longest goes first. Plain Python over ints: the bytes live in the stages.

Blocks are of kinds (`page_layout`): a block of kind k is `spans[k]` pages, any that are free, and is named by the
first of them. All kinds take from the same pages, and each has digests of its own.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from hashlib import blake2b


def root_digest(salt: str = "") -> bytes:
    """The parent of a sequence's first block; sequences with different salts never share."""
    return blake2b(salt.encode(), digest_size=16).digest()


def page_digest(parent: bytes, token_ids: Seq[int]) -> bytes:
    """128 bits of BLAKE2b over the parent's digest and the block's tokens: not to be forged by a prompt's author."""
    return blake2b(parent + array("i", token_ids).tobytes(), digest_size=16).digest()


class PagePool:
    """Pages 0 .. n_pages-1, in reference-counted blocks.

    A block is held (references > 0), or kept: held by nobody, but findable by its digest. All other pages are free.
    """

    def __init__(self, n_pages: int, spans: Seq[int] = (1,)) -> None:
        assert n_pages > 0 and min(spans) > 0
        self.n_pages = n_pages
        self.references = [0] * n_pages  # by block
        self._spans = tuple(spans)
        # a stack, lowest page on top: pages that were touched before are taken before fresh memory
        self._free = list(range(n_pages - 1, -1, -1))
        self._kept: OrderedDict[int, int] = OrderedDict()  # block -> kind, longest unused first
        self._n_kept = 0  # pages of them
        self._pages_of: dict[int, tuple[int, ...]] = {}  # blocks of several pages, the one that names it first
        self._digest_of: dict[int, bytes] = {}
        self._block_of: tuple[dict[bytes, int], ...] = tuple({} for _ in spans)  # for each kind

    @property
    def n_available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + self._n_kept

    @property
    def n_free(self) -> int:
        """Pages that nobody holds and that hold nothing to be found."""
        return len(self._free)

    @property
    def n_kept(self) -> int:
        return self._n_kept

    @property
    def n_held(self) -> int:
        return self.n_pages - len(self._free) - self._n_kept

    def pages_of(self, block: int) -> tuple[int, ...]:
        """The pages of a held block, one for each group of its kind."""
        return self._pages_of.get(block) or (block,)

    def allocate(self, kind: int = 0) -> int:
        """A block with one reference; forgets what is unused for longest if too few pages are free."""
        span, free = self._spans[kind], self._free
        while len(free) < span:
            self._forget()
        if span == 1:
            block = free.pop()
        else:
            pages = tuple(free[: -span - 1 : -1])
            del free[-span:]
            block = pages[0]
            self._pages_of[block] = pages
        self.references[block] = 1
        return block

    def _forget(self) -> None:
        assert self._kept, "allocate from an empty pool"
        block, kind = self._kept.popitem(last=False)
        self._n_kept -= self._spans[kind]
        del self._block_of[kind][self._digest_of.pop(block)]
        self._free.extend(reversed(self._pages_of.pop(block, (block,))))

    def share(self, block: int) -> None:
        """One more reference to a held or kept block."""
        if self.references[block] == 0:
            self._n_kept -= self._spans[self._kept.pop(block)]
        self.references[block] += 1

    def release(self, blocks: Iterable[int], kind: int = 0) -> None:
        """Take one reference off each; a sequence's last block comes first, as it is the least likely to be reused."""
        references = self.references
        for block in blocks:
            assert references[block] > 0, f"block {block} is released twice"
            references[block] -= 1
            if references[block] == 0:
                if block in self._digest_of:
                    self._kept[block] = kind
                    self._n_kept += self._spans[kind]
                else:
                    self._free.extend(reversed(self._pages_of.pop(block, (block,))))

    def remember(self, block: int, digest: bytes, kind: int = 0) -> None:
        """Make a full, computed block findable; a second one of the same content stays unknown."""
        assert self.references[block] > 0
        if digest not in self._block_of[kind] and block not in self._digest_of:
            self._block_of[kind][digest] = block
            self._digest_of[block] = digest

    def known(self, kind: int = 0) -> dict[bytes, int]:
        """digest -> block of all that can be found; not to be changed."""
        return self._block_of[kind]

    def n_kept_among(self, blocks: Iterable[int], kind: int = 0) -> int:
        """Pages of those of these distinct blocks that nobody holds: sharing them makes the pool so much smaller."""
        return self._spans[kind] * sum(1 for block in blocks if self.references[block] == 0)

    def check(self, held: Iterable[tuple[int, int]] | None = None) -> None:
        """Assert that the books balance; `held` lists every reference that the pool's users know of: (kind, block)."""
        known = {block: kind for kind, blocks in enumerate(self._block_of) for block in blocks.values()}
        assert known.keys() == self._digest_of.keys() and len(known) == sum(map(len, self._block_of))
        for block, digest in self._digest_of.items():
            assert self._block_of[known[block]][digest] == block
        assert self._kept.items() <= known.items(), "a kept block is not findable, or as another kind"
        assert self._n_kept == sum(self._spans[kind] for kind in self._kept.values())
        used = {block for block, count in enumerate(self.references) if count}
        assert min(self.references) >= 0 and not used & self._kept.keys(), "a block is both held and kept"
        assert known.keys() <= used | self._kept.keys(), "a free block is findable"
        further = [page for block, pages in self._pages_of.items() for page in pages if page != block]
        pages = [*used, *self._kept, *further, *self._free]
        assert len(pages) == self.n_pages == len(set(pages)), "a page is in two places or in none"
        assert self._pages_of.keys() <= used | self._kept.keys()
        assert all(len(self.pages_of(block)) == self._spans[kind] for block, kind in self._kept.items())
        if held is not None:
            counts = Counter(held)
            assert sum(counts.values()) == sum(self.references), "references leak"
            for (kind, block), count in counts.items():
                assert self.references[block] == count, "references leak"
                assert len(self.pages_of(block)) == self._spans[kind], "a block of another kind"
                assert known.get(block, kind) == kind
