"""PagePool: its books balance, prefixes are found by content, the page unused for longest goes first."""

from __future__ import annotations

import random

import pytest

from pyinfer.runtime.pages import PagePool, page_digest, root_digest

pytestmark = pytest.mark.unit


def chain(*pages: list[int], salt: str = "") -> list[bytes]:
    digests = [root_digest(salt)]
    for tokens in pages:
        digests.append(page_digest(digests[-1], tokens))
    return digests[1:]


def found(pool: PagePool, digests: list[bytes], kind: int = 0) -> list[int]:
    """What is known of these, in order."""
    return [pool.known(kind)[digest] for digest in digests if digest in pool.known(kind)]


def test_digest_depends_on_tokens_on_what_is_before_and_on_the_salt() -> None:
    a, b = chain([1, 2], [3, 4])
    assert chain([1, 2], [3, 4]) == [a, b]
    assert chain([1, 2], [3, 5])[0] == a
    assert chain([1, 9], [3, 4])[1] != b
    assert chain([1, 2], salt="x")[0] != a
    assert page_digest(root_digest(), [258]) != page_digest(root_digest(), [2, 1])


def test_pages_are_reused_before_fresh_ones_are_touched() -> None:
    pool = PagePool(8)
    first = pool.allocate()
    pool.release([first])
    assert pool.allocate() == first == 0


def test_shared_page_is_freed_by_its_last_holder() -> None:
    pool = PagePool(2)
    page = pool.allocate()
    pool.share(page)
    pool.release([page])
    pool.check([(0, page)])
    assert pool.n_available == 1
    pool.release([page])
    pool.check([])
    assert pool.n_available == 2


def test_released_prefix_is_found_until_its_place_is_needed() -> None:
    pool = PagePool(3)
    digests = chain([1], [2], [3])
    pages = [pool.allocate() for _ in digests]
    for page, digest in zip(pages, digests, strict=True):
        pool.remember(page, digest)
    pool.release(reversed(pages))
    pool.check([])
    assert pool.n_kept == 3 and found(pool, digests) == pages
    assert pool.allocate() == pages[2], "the end of a sequence goes first"
    assert found(pool, digests) == pages[:2]
    pool.share(pages[0])
    pool.release([pages[0]])  # used again: now page 1 is the one unused for longest
    assert pool.allocate() == pages[1]
    assert found(pool, digests) == pages[:1]
    pool.check([(0, pages[2]), (0, pages[1])])


def test_same_content_is_remembered_once() -> None:
    pool = PagePool(2)
    [digest] = chain([1])
    a, b = pool.allocate(), pool.allocate()
    pool.remember(a, digest)
    pool.remember(b, digest)
    assert found(pool, [digest]) == [a]
    pool.release([a, b])
    assert pool.n_kept == 1
    pool.check([])


def test_double_release_and_empty_pool_are_bugs_that_show() -> None:
    pool = PagePool(1)
    page = pool.allocate()
    with pytest.raises(AssertionError):
        pool.allocate()
    pool.release([page])
    with pytest.raises(AssertionError):
        pool.release([page])


def test_check_sees_a_leak() -> None:
    pool = PagePool(4)
    held = [pool.allocate(), pool.allocate()]
    pool.check((0, page) for page in held)
    with pytest.raises(AssertionError, match="leak"):
        pool.check((0, page) for page in held[:1])
    pool.references[held[0]] = 0
    with pytest.raises(AssertionError):
        pool.check()


def test_random_use_against_a_plain_model() -> None:
    """20,000 operations beside a model that knows nothing of free lists: a set of held pages, a list by last use."""
    rng = random.Random(0)
    pool = PagePool(12)
    holders: list[list[int]] = []
    content: dict[int, bytes] = {}  # page -> digest, of remembered pages
    idle: list[int] = []  # kept pages, longest unused first
    n_evicted = 0
    for step in range(20_000):
        choice = rng.random()
        held = [page for pages in holders for page in pages]
        if choice < 0.4 and pool.n_available:
            before = list(idle)
            page = pool.allocate()
            assert page not in held
            if page in before:
                assert page == before[0] and len(set(held)) + len(before) == 12
                idle.remove(page)
                del content[page]
                n_evicted += 1
            holders.append([page])
        elif choice < 0.6 and holders:
            pages = holders.pop(rng.randrange(len(holders)))
            pool.release(reversed(pages))
            rest = {page for other in holders for page in other}
            idle += [page for page in reversed(pages) if page not in rest and page in content]
        elif choice < 0.8 and holders:
            page = rng.choice(rng.choice(holders))
            digest = root_digest(str(rng.randrange(20)))
            if page not in content and digest not in content.values():
                content[page] = digest
            pool.remember(page, digest)
        elif content:
            page, digest = rng.choice(list(content.items()))
            assert found(pool, [digest]) == [page]
            pool.share(page)
            if page in idle:
                idle.remove(page)
            holders.append([page])
        pool.check((0, page) for pages in holders for page in pages)
        assert pool.n_kept == len(idle), step
    assert n_evicted > 500
