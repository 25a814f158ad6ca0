"""Text that comes token by token: whole characters, nothing of a stop string, the same in the end as decoding at
once.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import real_vocabulary

from pyinfer.runtime.detokenizer import IncrementalDetokenizer
from pyinfer.runtime.tokenizer import Tokenizer

pytestmark = pytest.mark.unit

NAMES = st.sampled_from(["gpt-2", "llama-spm", "bert-bge"])
IDS = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 50_000)), max_size=30)


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token for each byte."""
    known = {tokenizer.token_bytes(i): i for i in range(260) if i not in tokenizer.special_ids}
    return [known[bytes([b])] for b in data]


@settings(derandomize=True, deadline=None, max_examples=300)
@given(NAMES, IDS, st.booleans())
def test_pieces_together_are_the_whole(name: str, ids: list[int], skip_special: bool) -> None:
    tokenizer = real_vocabulary(name)
    ids = [i % tokenizer.n_vocab for i in ids]
    if skip_special and tokenizer.add_eos and ids and ids[-1] == tokenizer.eos_id:
        ids = ids[:-1]
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special)
    text = "".join(detokenizer.push(i) for i in ids) + detokenizer.finish()
    assert text == tokenizer.decode(ids, skip_special, clean_spaces=False)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_stops_cut_where_the_first_is_complete(text: str, stops: list[str], include: bool) -> None:
    tokenizer = real_vocabulary("gpt-2")
    detokenizer = IncrementalDetokenizer(tokenizer, stop=stops, include_stop=include)
    shown = ""
    expected, stopped = text, None
    for end in range(len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stopped = max(found, key=len)
            expected = text[:end] if include else text[: end - len(stopped)]
            break
    for i in byte_ids(tokenizer, text.encode()):
        shown += detokenizer.push(i)
        assert expected.startswith(shown)
    shown += detokenizer.finish()
    assert (shown, detokenizer.stopped) == (expected, stopped)
    assert detokenizer.push(5) == "" or stopped is None


@settings(derandomize=True, deadline=None)
@given(st.binary(max_size=40))
def test_bytes_that_are_no_text(data: bytes) -> None:
    tokenizer = real_vocabulary("gpt-2")
    detokenizer = IncrementalDetokenizer(tokenizer)
    text = "".join(detokenizer.push(i) for i in byte_ids(tokenizer, data)) + detokenizer.finish()
    assert text == data.decode("utf-8", "replace")


def test_a_character_waits_for_its_last_byte() -> None:
    tokenizer = real_vocabulary("gpt-2")
    detokenizer = IncrementalDetokenizer(tokenizer)
    pushed = [detokenizer.push(i) for i in byte_ids(tokenizer, "a😀b".encode())]
    assert pushed == ["a", "", "", "", "😀", "b"]


def test_bad_bytes_show_as_soon_as_they_are_certain() -> None:
    tokenizer = real_vocabulary("gpt-2")
    detokenizer = IncrementalDetokenizer(tokenizer)
    assert [detokenizer.push(i) for i in byte_ids(tokenizer, b"\xf0\x9fa")] == ["", "", "\ufffda"]
    detokenizer.push(byte_ids(tokenizer, b"\xf0")[0])
    assert detokenizer.finish() == "\ufffd"


def test_only_what_may_become_a_stop_is_held_back() -> None:
    tokenizer = real_vocabulary("gpt-2")
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["aab"])
    assert [detokenizer.push(i) for i in byte_ids(tokenizer, b"xaaab")] == ["x", "", "", "a", ""]
    assert detokenizer.stopped == "aab" and detokenizer.finish() == ""


def test_stop_within_one_token_cuts_it() -> None:
    tokenizer = real_vocabulary("gpt-2")
    (token,) = tokenizer.encode(" hello")
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["ll"])
    assert detokenizer.push(token) == " he"
    including = IncrementalDetokenizer(tokenizer, stop=["ll"], include_stop=True)
    assert including.push(token) == " hell"


def test_no_stop_in_the_first_tokens() -> None:
    tokenizer = real_vocabulary("gpt-2")
    detokenizer = IncrementalDetokenizer(tokenizer, stop=["ab"], min_tokens=2)
    assert [detokenizer.push(i) for i in byte_ids(tokenizer, b"abcab")] == ["a", "b", "c", "", ""]
    assert detokenizer.stopped == "ab"


def test_leading_space_of_sentencepiece() -> None:
    tokenizer = real_vocabulary("llama-spm")
    word = tokenizer.encode("of", add_special=False)[0]
    assert IncrementalDetokenizer(tokenizer).push(word) == "of"
    assert IncrementalDetokenizer(tokenizer, continues=True).push(word) == " of"


def test_ids_of_a_padded_output_matrix_have_no_text() -> None:
    tokenizer = real_vocabulary("gpt-2")
    assert IncrementalDetokenizer(tokenizer).push(tokenizer.n_vocab) == ""
