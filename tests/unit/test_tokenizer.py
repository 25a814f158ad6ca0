"""Special tokens, defaults and errors of tokenizers, on vocabularies made for the purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vocabularies import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, byte_alphabet, made_up, real_vocabulary

from pyinfer.errors import TokenizerError
from pyinfer.quant.gguf import GGUFFile
from pyinfer.quant.writer import write_gguf
from pyinfer.runtime.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.unit

BYTES = [(c, NORMAL) for c in byte_alphabet()]


def bpe(folder: Path, *tokens: tuple[str, int], **metadata: Any) -> Tokenizer:
    """Single bytes (ids 0 to 255), then `tokens`; no merges unless given."""
    metadata = {"pre": "gpt-2", "merges": ["a b"], **metadata}
    return made_up(folder, "gpt2", [*BYTES, ("ab", NORMAL), *tokens], **metadata)


def spm(folder: Path, pieces: dict[str, float], **metadata: Any) -> Tokenizer:
    """<unk> <s> </s>, the 256 bytes, then `pieces` with their scores (ids from 259)."""
    tokens = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((f"<0x{b:02X}>", BYTE) for b in range(256))]
    scores = [0.0] * 259 + list(pieces.values())
    return made_up(folder, "llama", [*tokens, *((p, NORMAL) for p in pieces)], scores=scores, **metadata)


def test_text_cannot_spell_control_tokens(tmp_path: Path) -> None:
    tokenizer = bpe(tmp_path, ("<|im_start|>", CONTROL), ("<x>", USER_DEFINED), ("<unk>", UNKNOWN))
    start, user, unknown = 257, 258, 259
    text = "<|im_start|><x><unk>"
    assert tokenizer.encode(text, parse_special=True) == [start, user, unknown]
    plain = tokenizer.encode(text)
    assert user in plain and start not in plain and unknown not in plain
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode([start, user]) == "<x>"
    assert tokenizer.decode([start, user], skip_special=False) == "<|im_start|><x>"
    assert tokenizer.special_ids == {start, unknown}


def test_longest_special_token_first(tmp_path: Path) -> None:
    tokenizer = bpe(tmp_path, ("<ab", USER_DEFINED), ("bcdef", USER_DEFINED), ("cd", USER_DEFINED))
    assert [tokenizer.token_text(i) for i in tokenizer.encode("<abcdefcd")] == ["<", "a", "bcdef", "cd"]


def test_many_special_tokens(tmp_path: Path) -> None:
    names = [(f"<unused{i}>", USER_DEFINED) for i in range(300)] + [("\n" * n, USER_DEFINED) for n in range(2, 9)]
    tokenizer = bpe(tmp_path, *names)
    text = "x<unused7><unused70>" + "\n" * 19 + "<unused299>" * 3 + "<unused"
    pieces = [tokenizer.token_text(i) for i in tokenizer.encode(text)]
    assert pieces[:6] == ["x", "<unused7>", "<unused70>", "\n" * 8, "\n" * 8, "\n" * 3]
    assert pieces[6:9] == ["<unused299>"] * 3 and "".join(pieces[9:]) == "<unused"


def test_phi3_control_tokens_take_the_space_after_them(tmp_path: Path) -> None:
    tokens = [("<|user|>", CONTROL), ("<|endoftext|>", CONTROL)]
    tokenizer = bpe(tmp_path, *tokens, name="Phi-3 mini")
    assert tokenizer.encode("<|user|> \n a", parse_special=True) == [257, tokenizer.encode("a")[0]]
    assert len(tokenizer.encode("<|endoftext|> a", parse_special=True)) == 3


def test_mask_token_takes_the_space_before_it(tmp_path: Path) -> None:
    tokenizer = bpe(tmp_path, ("<mask>", CONTROL), pre="jina-v2-code")
    assert tokenizer.encode("a  <mask>", parse_special=True) == [tokenizer.encode("a")[0], 257]


def test_bos_and_eos(tmp_path: Path) -> None:
    ends = [("<bos>", CONTROL), ("<end>", CONTROL)]
    silent = bpe(tmp_path, *ends, bos_token_id=257, eos_token_id=258)
    assert not silent.add_bos and silent.encode("ab") == [256]
    told = bpe(tmp_path, *ends, bos_token_id=257, eos_token_id=258, add_bos_token=True, add_eos_token=True)
    assert told.encode("ab") == [257, 256, 258]
    assert told.encode("ab", add_special=False) == [256]
    assert told.decode([257, 256, 258]) == "ab"
    assert (told.bos_token, told.eos_token) == ("<bos>", "<end>")
    llama3 = bpe(tmp_path, *ends, bos_token_id=257, pre="llama-bpe")
    assert llama3.encode("ab") == [257, 256]
    without = bpe(tmp_path, pre="llama-bpe")
    assert without.bos_id is None and not without.add_bos and without.encode("ab") == [256]


def test_end_of_generation(tmp_path: Path) -> None:
    tokens = [("<|im_end|>", NORMAL), ("<|fim_pad|>", CONTROL), ("<|repo_name|>", CONTROL), ("<|fim_prefix|>", CONTROL)]
    tokenizer = bpe(tmp_path, *tokens, eos_token_id=65)
    assert tokenizer.eog_ids == {65, 257, 258, 259}
    assert tokenizer.eot_id == 257
    assert 257 in tokenizer.special_ids  # whatever its type says


def test_end_of_message_is_not_the_end_in_harmony(tmp_path: Path) -> None:
    names = ["<|end|>", "<|return|>", "<|call|>", "<|channel|>"]
    tokenizer = bpe(tmp_path, *((name, CONTROL) for name in names), eos_token_id=258)
    assert tokenizer.eog_ids == {258, 259}
    assert tokenizer.decode([260, 256, 257]) == "<|channel|>ab<|end|>"
    assert len(tokenizer.encode("<|channel|>")) > 1


def test_ignore_merges(tmp_path: Path) -> None:
    assert len(bpe(tmp_path, ("xyz", NORMAL)).encode("xyz")) == 3
    assert bpe(tmp_path, ("xyz", NORMAL), pre="llama-bpe").encode("xyz") == [257]


def test_merges_through_pieces_that_are_no_tokens(tmp_path: Path) -> None:
    tokenizer = bpe(tmp_path, ("xyz", NORMAL), merges=["x y", "xy z", "xy z", "p q"])
    assert tokenizer.encode("xyz") == [257]
    assert [tokenizer.token_text(i) for i in tokenizer.encode("xy pq")] == ["x", "y", "Ġ", "p", "q"]


def test_spm_merges_by_score_and_leftmost_at_equal_scores(tmp_path: Path) -> None:
    pieces = {"▁": -9.0, "a": -9.0, "b": -9.0, "ab": -2.0, "ba": -1.0, "▁▁": -5.0, "▁▁▁": -5.0, "aba": -3.0}
    tokenizer = spm(tmp_path, pieces, add_space_prefix=False)

    def words(text: str) -> list[str]:
        return [tokenizer.token_text(i) for i in tokenizer.encode(text, add_special=False)]

    assert words("aba") == ["aba"]  # "ba" first, then "a" + "ba"
    assert words("abb") == ["ab", "b"]
    assert words(" " * 5) == ["▁▁▁", "▁▁"]
    assert words("é") == ["<0xC3>", "<0xA9>"]


def test_spm_space_prefix(tmp_path: Path) -> None:
    pieces = {"▁": -1.0, "a": -1.0, "▁a": -0.5}
    tokenizer = spm(tmp_path, pieces)
    assert tokenizer.encode("a") == [1, 261]
    assert tokenizer.encode("a</s>a", parse_special=True) == [1, 261, 2, 261]
    assert tokenizer.decode([261, 261]) == "a a"
    assert tokenizer.decode([1, 261]) == " a"
    bare = spm(tmp_path, pieces, add_space_prefix=False, add_bos_token=False)
    assert bare.encode("a") == [260]
    assert bare.decode([261]) == " a"


def test_unused_tokens_have_no_text(tmp_path: Path) -> None:
    assert bpe(tmp_path, ("hidden", UNUSED)).token_bytes(257) == b""


def test_lone_surrogates_and_bad_bytes(tmp_path: Path) -> None:
    tokenizer = bpe(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"


def test_clean_spaces(tmp_path: Path) -> None:
    tokenizer = bpe(tmp_path)
    ids = tokenizer.encode("Hi , it 's ' ok ' we 're")
    assert tokenizer.decode(ids) == "Hi, it's'ok'we're"
    assert tokenizer.decode(ids, clean_spaces=False) == "Hi , it 's ' ok ' we 're"
    assert bpe(tmp_path, pre="qwen2").decode(ids) == "Hi , it 's ' ok ' we 're"


def test_long_runs_stay_quick() -> None:
    # Quadratic work on any of these would outlast the test's time limit many times over.
    for name in ("gpt-2", "llama-spm", "bert-bge", "deepseek-coder"):
        tokenizer = real_vocabulary(name)
        for text in ("a" * 200_000, " " * 200_000 + "x", "7" * 200_000, "\n" * 200_000, "<" * 200_000):
            assert tokenizer.encode(text, parse_special=True)


def test_an_id_outside_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = bpe(tmp_path)
    for bad in (-1, 257):
        with pytest.raises(TokenizerError, match=f"{bad} is not in the vocabulary"):
            tokenizer.decode([bad])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "names no tokenizer"),
        ({"model": "t5", "tokens": ["a"]}, "'t5'.*not supported"),
        ({"model": "rwkv", "tokens": ["a"]}, "'rwkv'.*not supported"),
        ({"model": "plamo2", "tokens": ["a"]}, "'plamo2'.*not supported"),
        ({"model": "gpt2", "tokens": ["a"], "merges": ["a b"], "pre": "made-up"}, "unknown pre-tokenizer 'made-up'"),
        ({"model": "gpt2", "tokens": ["a"], "merges": ["a b"]}, "does not say how its tokenizer splits"),
        ({"model": "gpt2", "tokens": ["a"], "pre": "qwen2"}, "no merges"),
        ({"model": "llama"}, "no vocabulary"),
        ({"model": "llama", "tokens": [1, 2]}, "no vocabulary"),
        ({"model": "llama", "tokens": ["a", "b"], "scores": [0.5]}, "scores does not hold one number"),
        ({"model": "bert", "tokens": ["a"]}, "no unknown token"),
    ],
)
def test_errors(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    write_gguf(path, {"general.architecture": "llama", **{f"tokenizer.ggml.{k}": v for k, v in keys.items()}}, {})
    with pytest.raises(TokenizerError, match=message) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_an_open_file_serves_too(tmp_path: Path) -> None:
    spm(tmp_path, {"a": 0.0})
    with GGUFFile.open(tmp_path / "vocabulary.gguf") as file:
        assert load_tokenizer(file).n_vocab == 260
