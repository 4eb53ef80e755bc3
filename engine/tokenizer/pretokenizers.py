r"""Pre-tokenizers of byte-level BPE: the regexes that cut text into pieces before merging, by `tokenizer.ggml.pre`.

The patterns of one pre-tokenizer work one after another: each cuts every piece made so far into its matches and the
gaps between them. Syntax is Oniguruma's (of the `tokenizers` library): `&&` in a class is an intersection.

Characters beyond ASCII are escaped without exception: written out, U+1F7D and its like do not survive a normalising
editor or terminal, and a range then ends in the wrong place.

Source: the models' own tokenizer.json, and llama.cpp src/llama-vocab.cpp for names, ignore_merges and add_bos.
llama.cpp departs from the true regexes, which are used here: it makes no cut at a change of case in kimi-k2 and youtu,
knows the case of ASCII letters only in gpt-4o and tekken, and leaves U+3000, U+2028 and the like out of the CJK class
in deepseek-llm and deepseek-coder.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pretokenizer:
    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a piece that is a token as a whole is not merged up from its bytes
    add_bos: bool = False  # where the file has no add_bos_token


def _char_class(ranges: str) -> str:
    r"""'41-5A B5' -> '\x{41}-\x{5A}\x{B5}', the inside of a character class."""
    return "".join("-".join(rf"\x{{{end}}}" for end in r.split("-")) for r in ranges.split())


# Letters with case as DeepSeek's first tokenizer lists them: a part of Lu, Ll and Lt, without (among others) Armenian
# small letters, Georgian and the mathematical alphabets.
CASED = _char_class(
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F "
    "104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
_CJK = r"[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _LLAMA3.replace("{1,3}", "")


def _cased_words(upper: str, lower: str, suffix: str) -> str:
    """Words cut where a small letter meets a capital: HelloWorld -> Hello|World, HTTPServer -> HTTPServer."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{upper}*{lower}+{suffix}|{start}{upper}+{lower}*{suffix}"


def _gpt4o(digits: str, suffix: str) -> str:
    words = _cased_words(r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", suffix)
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


def _kimi() -> str:
    words = _cased_words(
        r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", f"{_CONTRACTIONS}?"
    )
    return rf"[\p{{Han}}]+|{words}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


_KINDS: dict[tuple[str, ...], Pretokenizer] = {
    ("deepseek-llm",): Pretokenizer(
        (
            r"[\r\n]",
            rf"\s?[{CASED}]+",
            r"\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"(?<!\s)\s++$",  # the model's own \s+$ is quadratic in the length of a run of spaces
            _CJK,
            r"\p{N}+",
        )
    ),
    ("deepseek-coder",): Pretokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    ("deepseek-v3", "joyai-llm", "hunyuan-dense", "hy_v4"): Pretokenizer(
        (
            r"\p{N}{1,3}",
            r"[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
            rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}",
        )
    ),
    ("kimi-k2",): Pretokenizer((_kimi(),)),
    ("glm4", "glm5"): Pretokenizer((_LLAMA3,), ignore_merges=True),
    ("chatglm-bpe",): Pretokenizer((_LLAMA3,)),
    (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1"),
        *("pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    ): Pretokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
    ("qwen2", "deepseek-r1-qwen", "megrez", "kormo", "f2llmv2"): Pretokenizer((_QWEN2,)),
    ("smollm", "starcoder", "command-r"): Pretokenizer((r"\p{N}", _GPT2)),
    ("gpt-2", "gigachat", "phi-2", "a.x-4.0", "mellum", "exaone4"): Pretokenizer((_GPT2,)),
    ("default",): Pretokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    ("gpt-4o", "kanana2", "llama4"): Pretokenizer((_gpt4o(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),)),
    ("tekken",): Pretokenizer((_gpt4o(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    ("youtu",): Pretokenizer(
        (
            r"[\uac00-\ud7a3\u3131-\u318e]+"
            r"|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
            r"|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
            _gpt4o(r"\p{N}", f"{_CONTRACTIONS}?"),
        ),
        ignore_merges=True,
    ),
}
PRETOKENIZERS: dict[str, Pretokenizer] = {name: kind for names, kind in _KINDS.items() for name in names}
