"""How each `tokenizer.ggml.pre` name splits text into words before BPE, and the defaults that come with the name.

Names, patterns and defaults are llama.cpp's (`llama-vocab.cpp`), which takes them from each model's `tokenizer.json`.
Patterns are written for Oniguruma, the engine inside `tokenizers`. llama.cpp knows no letter case beyond ASCII, so
its `\\p{Lu}`, `\\p{Ll}` and so on all mean `\\p{L}`; the patterns below say what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyinfer.errors import TokenizerError
from pyinfer.runtime.pretokenizer_steps import digits_by_three, lines, superbpe_numbers, words

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer


@dataclass(frozen=True)
class PreTokenizerSpec:
    """One way to split: `patterns` apply in order, each inside the pieces that the one before it left."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is taken whole
    add_bos: bool = False
    no_default_bos: bool = False  # no BOS unless the file names one
    clean_spaces: bool = True  # decode drops the space before punctuation
    byte_level: bool = True  # GPT-2's byte alphabet; otherwise plain text with <0xXX> tokens
    escape_spaces: bool = False  # U+2581 stands for a space
    lowercase: bool = False
    force_bos: bool = False  # BOS even where the file says no
    merges_optional: bool = False
    split_first: Callable[[str], list[str]] | None = None  # a first step that no regular expression does in linear time
    whole_line_ends: bool = False  # a run of line ends that is a token is taken whole


_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+|" + _SPACES
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SYMBOLS_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_PUNCTUATION_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_HAN = (
    "\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b820-\U0002ceaf\U0002ceb0-\U0002ebef\uf900-\ufaff\U0002f800-\U0002fa1f"
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES
_LLAMA3 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|{_LINES}"
_QWEN2 = rf"{_CONTRACTION}|{_WORD}|\p{{N}}|{_SYMBOLS}|{_LINES}"
_DEEPSEEK3 = rf"{_PUNCTUATION_WORD}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES}"
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


def _casedwords(letters: str, suffix: str, numbers: str) -> str:
    """The GPT-4o family: a word is capitals, then small letters. Only ASCII has case here; other letters are both."""
    upper, lower = rf"[{letters}&&[^a-z]]", rf"[{letters}&&[^A-Z]]"
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}"
    return rf"{words}|{numbers}|{_SYMBOLS_SLASH}|{_LINES}"


_UNCASED_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+{_CONTRACTION}?"

# The letters of the cased alphabets, as DeepSeek-LLM lists them.
_DEEPSEEK_LETTERS = (
    "A-Za-z\xb5\xc0-\xd6\xd8-\xf6\xf8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)

# A space beyond ASCII is only ever a space to llama.cpp, also where it lies in one of these ranges.
_DEEPSEEK_CJK = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff&&[^\s]]+"


_Spec = PreTokenizerSpec
_GPT2_DIGITS = (r"\p{N}", _GPT2)
_DEEPSEEK3_ALL = (r"\p{N}{1,3}", _CJK, _DEEPSEEK3)
_GEMMA4 = _Spec((), byte_level=False, escape_spaces=True, force_bos=True, split_first=lines, whole_line_ends=True)

_FAMILIES: list[tuple[str, PreTokenizerSpec]] = [
    ("default", _Spec((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"))),
    (
        "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        _Spec((_LLAMA3,), ignore_merges=True, add_bos=True),
    ),
    (
        "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert exaone4 mpt olmo jais"
        " jina-v1-en jina-v2-code roberta-bpe",
        _Spec((_GPT2,)),
    ),
    ("trillion granite-docling", _Spec((_GPT2,), clean_spaces=False)),
    ("starcoder refact codeshell exaone minerva-7b mellum2", _Spec(_GPT2_DIGITS)),
    ("command-r smollm", _Spec(_GPT2_DIGITS, clean_spaces=False)),
    ("qwen2 deepseek-r1-qwen kormo f2llmv2 hunyuan solar-open grok-2", _Spec((_QWEN2,), clean_spaces=False)),
    ("stablelm2 megrez", _Spec((_QWEN2,))),
    (
        "qwen35",
        _Spec(
            (
                rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LINES}",
            ),
            clean_spaces=False,
        ),
    ),
    ("dbrx smaug-bpe", _Spec((_LLAMA3,))),
    ("chatglm-bpe", _Spec((_LLAMA3,), no_default_bos=True)),
    ("glm4 glm5", _Spec((_LLAMA3,), no_default_bos=True, ignore_merges=True)),
    ("minicpm5", _Spec((r"\p{N}{1,3}", rf"{_CONTRACTION}|{_WORD}|\p{{N}}+|{_SYMBOLS}|{_LINES}"), ignore_merges=True)),
    (
        "jais-2",
        _Spec(
            (
                # Only where a run of spaces starts: tried in each of its parts, the time would be quadratic.
                rf"{_CONTRACTION}|{_WORD}|\p{{N}}{{1,3}}|{_SYMBOLS}|(?<![^\S\r\n])\s*[\r\n]+"
                + "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
                + r"|\s{1,2}(?!\S)|\s",
            )
        ),
    ),
    (
        "deepseek-llm",
        _Spec(
            (
                r"[\r\n]",
                rf"\s?[{_DEEPSEEK_LETTERS}]+",
                "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001-\u3002]+",
                r"\s+$",
                _DEEPSEEK_CJK,
                r"\p{N}+",
            ),
            clean_spaces=False,
        ),
    ),
    (
        "deepseek-coder",
        _Spec((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}"), clean_spaces=False),
    ),
    ("deepseek-v3 hunyuan-dense hy_v4 joyai-llm", _Spec(_DEEPSEEK3_ALL, clean_spaces=False)),
    (
        "spark2_5",
        _Spec(
            (
                r"\p{N}{1,3}",
                _CJK,
                rf"{_PUNCTUATION_WORD}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{_SPACES}",
                r"\p{N}",
            ),
            clean_spaces=False,
        ),
    ),
    (
        "youtu",
        _Spec(
            (
                "[\uac00-\ud7a3\u3131-\u318e]+"
                "|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
                f"|[\u3105-\u312f]+|{_CJK}",
                rf"{_UNCASED_WORDS}|\p{{N}}|{_SYMBOLS_SLASH}|{_LINES}",
            ),
            clean_spaces=False,
            ignore_merges=True,
        ),
    ),
    ("falcon", _Spec((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"))),
    ("bloom gpt3-finnish", _Spec((_BLOOM,))),
    ("poro-chat", _Spec((_BLOOM,), clean_spaces=False)),
    ("viking", _Spec((_BLOOM, r"\p{N}"), clean_spaces=False)),
    (
        "tekken",
        _Spec((_casedwords(r"\p{L}", "", r"\p{N}"),), clean_spaces=False, ignore_merges=True, add_bos=True),
    ),
    (
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        _Spec((_casedwords(r"\p{L}", f"{_CONTRACTION}?", r"\p{N}{1,3}"),), clean_spaces=False),
    ),
    (
        "granite-embed-multi-97m",
        _Spec((_casedwords(r"\p{L}\p{M}", f"{_CONTRACTION}?", r"\p{N}{1,3}"),), clean_spaces=False, ignore_merges=True),
    ),
    (
        "tiny_aya cohere2moe",
        _Spec(
            (rf"{_UNCASED_WORDS}|\p{{N}}{{1,3}}|{_SYMBOLS_SLASH}|{_LINES}",),
            clean_spaces=False,
            split_first=digits_by_three,
        ),
    ),
    (
        "chameleon",
        _Spec(
            (
                "<sentinel:[0-9]+>",
                "IMGIMG[A-I]{1,4}Z",
                r"[\t\n]|    |  ",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            clean_spaces=False,
            add_bos=True,
        ),
    ),
    (
        "kimi-k2",
        _Spec(
            (
                rf"[{_HAN}]+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{_HAN}]]+{_CONTRACTION}?"
                rf"|\p{{N}}{{1,3}}|{_SYMBOLS}|{_LINES}",
            ),
            clean_spaces=False,
            merges_optional=True,
        ),
    ),
    ("superbpe", _Spec((), clean_spaces=False, split_first=superbpe_numbers)),
    (
        "bailingmoe bailingmoe2 llada-moe",
        _Spec(
            (rf"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|{_WORD}|\p{{N}}|{_SYMBOLS}|\s*[\r\n]|{_SPACES}",),
            clean_spaces=False,
        ),
    ),
    (
        "seed-coder",
        _Spec((rf"{_CONTRACTION}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_LINES}",), clean_spaces=False),
    ),
    ("ufakzeka", _Spec((rf"{_WORD}|\p{{N}}|{_SYMBOLS}|{_LINES}",), clean_spaces=False)),
    (
        "afmoe",
        _Spec(
            (
                "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
                "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af"
                "\u1100-\u11ff]+",
                _DEEPSEEK3,
            ),
            clean_spaces=False,
            split_first=digits_by_three,
        ),
    ),
    ("laguna", _Spec((_QWEN2,), clean_spaces=False, split_first=lines)),
    (
        "exaone-moe",
        _Spec(
            (
                rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
                rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]|{_SPACES}",
            )
        ),
    ),
    ("gemma4 granite-embed-multi-311m", _GEMMA4),
    (
        "sarvam-moe",
        _Spec((), byte_level=False, escape_spaces=True, clean_spaces=False, split_first=lines),
    ),
    ("whitespace", _Spec((), byte_level=False, split_first=words)),
]

PRE_TOKENIZERS: dict[str, PreTokenizerSpec] = {name: spec for names, spec in _FAMILIES for name in names.split()}


def pre_tokenizer_spec(name: str) -> PreTokenizerSpec:
    """The spec for a `tokenizer.ggml.pre` name; an unknown one is an error, since a wrong split quietly makes a model
    worse.
    """
    spec = PRE_TOKENIZERS.get(name)
    if spec is None:
        raise TokenizerError(
            f"unknown pre-tokenizer '{name}' (tokenizer.ggml.pre); known: {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Update pyinfer, or convert the model again if the file names a wrong one",
            param="tokenizer.ggml.pre",
        )
    return spec


def build_pre_tokenizer(spec: PreTokenizerSpec) -> PreTokenizer | None:
    """The `tokenizers` form of `spec.patterns` and its alphabet; `split_first` is the caller's. None: no split at
    all.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    steps: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in spec.patterns]
    if spec.byte_level:
        steps.append(ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False))
    return Sequence(steps) if steps else None
