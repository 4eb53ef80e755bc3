"""Output that keeps to a grammar: a JSON schema, a regular expression or a Lark grammar, through llguidance.

    grammar = Grammar.json_schema({"type": "object", ...})      a value; costs nothing
    constraint = grammar.constraint(tokenizer, n_vocab)         the state of one text
    constraint.mask(logits)                                     -inf for each token that may not come next
    constraint.accept(token)                                    … that came
    constraint.finished                                         nothing but the end may come

End-of-text tokens are let through exactly where the text may end. Control tokens never match text: only a Lark grammar
may name one. Where the rest is certain ('": ' after a key, say), the tokens are those of the tokenizer.

A grammar is compiled in a thread of its own: the compiler follows chains of rules by recursion, 3,000 of which overrun
the 8 MiB of a usual stack and end the process; and what takes too long can be left behind. The result is kept, so the
second text costs 0.05 ms. Of 100,000 tokens, a mask takes 0.02 ms in the median and up to 20 ms where the lexer meets a
new state, and another 0.05 ms to apply; the vocabulary takes 0.8 s, once.

Source: llguidance 1.9 (github.com/guidance-ai/llguidance), docs/syntax.md for its dialect of Lark.
"""

from __future__ import annotations

import decimal
import json
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import EngineError, GrammarError
from .json_schema import closed

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

MAX_BYTES = 128 * 1024  # of a grammar's text; what needs more is data, and its compilation takes seconds
MAX_SECONDS = 10.0  # to compile it
MAX_MULTIPLE_OF = 100_000  # states of its automaton, however short the schema
STACK_BYTES = 256 * 1024 * 1024  # of address space: 128 KiB of rules need about 100 MB
N_KEPT = 16  # compiled grammars of a tokenizer
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True, slots=True)
class Grammar:
    """A grammar as text; made by json_schema, regex and lark. What is wrong with it shows in constraint()."""

    kind: str  # 'json_schema' | 'regex' | 'lark'
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON of this schema, laid out as json.dumps does: where blanks are free, a model may go on with them forever.

        Objects have no properties but those that they name, unless "additionalProperties" is given: json_schema.py.
        "x-guidance": {"whitespace_flexible": true} in the schema frees them, "coerce_one_of" takes oneOf for anyOf.
        """
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            text = json.dumps(closed(dict(value) if isinstance(value, Mapping) else value), ensure_ascii=False)
            huge = [n for n in _multiples(value) if n > MAX_MULTIPLE_OF]
        except (TypeError, ValueError, RecursionError) as error:
            raise GrammarError(f"the JSON schema is not JSON: {error}") from None
        if not isinstance(value, Mapping | bool):
            raise GrammarError(f"the JSON schema is of type {type(value).__name__}, expected an object")
        if huge:
            raise GrammarError(f"the JSON schema has a multipleOf of {huge[0]:,} units, expected at most 100,000")
        return cls("json_schema", text)._checked()

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that the regular expression matches as a whole (Rust's dialect: no look-around, no back-references)."""
        return cls("regex", pattern)._checked()

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Text of the rule `start`."""
        return cls("lark", text)._checked()

    def constraint(self, tokenizer: Tokenizer, n_vocab: int | None = None) -> Constraint:
        """A new state at the beginning of the text. GrammarError with llguidance's reason if the grammar is no good.

        n_vocab   length of the logits, where the model has more or fewer of them than the tokenizer has tokens
        """
        return Constraint(_compiled(self, tokenizer), tokenizer.n_vocab if n_vocab is None else n_vocab)

    def _checked(self) -> Grammar:
        if not isinstance(self.text, str):
            raise GrammarError(f"the {self} is of type {type(self.text).__name__}, expected text")
        try:
            n = len(self.text.encode())
        except UnicodeEncodeError as error:
            raise GrammarError(f"the {self} is not valid Unicode: a lone surrogate at {error.start}") from None
        if n > MAX_BYTES:
            raise GrammarError(f"the {self} has {n:,} bytes, expected at most {MAX_BYTES:,}")
        if not self.text.strip() and self.kind != "regex":
            raise GrammarError(f"the {self} is empty")
        return self

    def __str__(self) -> str:
        return {"json_schema": "JSON schema", "regex": "regex", "lark": "Lark grammar"}[self.kind]


class Constraint:
    """Where one text stands in its grammar. Not for several threads at once."""

    def __init__(self, matcher: Any, n_vocab: int) -> None:
        self._matcher = matcher
        self._n_vocab = n_vocab

    @property
    def finished(self) -> bool:
        """Nothing but the end may come, or the end has come."""
        return bool(self._matcher.is_stopped())

    @property
    def may_end(self) -> bool:
        """The text so far is a whole one."""
        return bool(self._matcher.is_accepting())

    def mask(self, logits: np.ndarray) -> None:
        """Set the logits (n_vocab,) of all tokens that may not come next to -inf."""
        assert logits.shape == (self._n_vocab,), (logits.shape, self._n_vocab)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, bitorder="little", count=min(len(logits), 8 * len(bits)))
        logits[len(allowed) :] = -np.inf
        np.copyto(logits[: len(allowed)], -np.inf, where=allowed == 0)

    def accept(self, token: int) -> None:
        """The next token; GrammarError if the grammar does not allow it."""
        if not self._matcher.consume_token(int(token)):
            self._check()
            raise GrammarError(f"token {token} does not continue the text as the grammar wants")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the grammar cannot be followed any further: {_reason(self._matcher.get_error())}")


def _compiled(grammar: Grammar, tokenizer: Tokenizer) -> Any:
    """A fresh LLMatcher of the grammar."""
    with _lock:
        vocabulary = _vocabularies.get(tokenizer)
        if vocabulary is None:
            vocabulary = _vocabularies[tokenizer] = _Vocabulary(tokenizer)
        matcher = vocabulary.kept.get(grammar)
    if matcher is None:
        matcher = _compile(grammar, vocabulary.tokenizer)  # others need not wait for it
    with _lock:
        vocabulary.kept[grammar] = matcher
        vocabulary.kept.move_to_end(grammar)
        while len(vocabulary.kept) > N_KEPT:
            vocabulary.kept.popitem(last=False)
        return matcher.deep_copy()


def _compile(grammar: Grammar, tokenizer: Any) -> Any:
    llguidance = _llguidance()
    matchers = llguidance.LLMatcher
    source = {
        "json_schema": lambda text: matchers.grammar_from_json_schema(text, defaults=_LAYOUT),
        "regex": matchers.grammar_from_regex,
        "lark": matchers.grammar_from_lark,
    }[grammar.kind]
    made: list[Any] = []

    def compile() -> None:
        try:
            limits = llguidance.LLParserLimits(verbose_errors=False)
            matcher = matchers(tokenizer, source(grammar.text), log_level=0, limits=limits)
            first = matcher.deep_copy()
            first.compute_bitmask()  # some grammars match nothing, which shows here
            made.append(first if first.is_error() else matcher)
        except Exception as error:
            made.append(error)

    _start(compile).join(MAX_SECONDS)
    if not made:
        raise GrammarError(f"the {grammar} is too large: compiling it takes more than {MAX_SECONDS:g} seconds")
    matcher = made[0]
    error = str(matcher) if isinstance(matcher, Exception) else matcher.get_error()
    if error:
        raise GrammarError(f"the {grammar} is no good: {_reason(error)}")
    return matcher


def _start(function: Callable[[], None]) -> threading.Thread:
    """The function in a thread with STACK_BYTES of stack; with the usual stack where the system does not grant it."""
    thread = threading.Thread(target=function, daemon=True, name="konly-grammar")
    with _stack_size:
        usual = threading.stack_size()
        try:
            threading.stack_size(STACK_BYTES)
            thread.start()
        except (ValueError, RuntimeError):
            threading.stack_size(usual)
            thread = threading.Thread(target=function, daemon=True, name="konly-grammar")
            thread.start()
        finally:
            threading.stack_size(usual)
    return thread


class _Vocabulary:
    """A tokenizer as llguidance knows it, and the grammars compiled for it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.kept: OrderedDict[Grammar, Any] = OrderedDict()
        if not tokenizer.eog_ids:
            raise GrammarError("this model has no end-of-text token, and a grammar needs one")
        self.tokenizer = _llguidance().LLTokenizer(_Wrapper(tokenizer), eos_token=sorted(tokenizer.eog_ids))


class _Wrapper:
    """What LLTokenizer reads of a tokenizer; it keeps this object."""

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.n_vocab)]
        skipped = {i for i in range(tokenizer.n_vocab) if tokenizer.is_skipped(i)}
        self.special_token_ids = sorted(skipped | tokenizer.eog_ids)
        self.eos_token_id = min(tokenizer.eog_ids) if tokenizer.eos_id is None else tokenizer.eos_id
        self.bos_token_id = tokenizer.bos_id
        special = set(self.special_token_ids)
        self._ids = {text: i for i, text in enumerate(self.tokens) if text and i not in special}
        self._longest = max(map(len, self._ids), default=1)
        self._encode = weakref.WeakMethod(tokenizer.encode)

    def __call__(self, text: str | bytes) -> list[int]:
        """Tokens of a text that is certain to come: the tokenizer's own if they spell it, else the longest that fit."""
        data = text.encode() if isinstance(text, str) else bytes(text)
        encode = self._encode()
        ids = [] if encode is None else encode(data.decode(errors="replace"), add_special=False)
        return ids if b"".join(self.tokens[i] for i in ids) == data else list(self._longest_first(data))

    def _longest_first(self, data: bytes) -> Iterator[int]:
        at = 0
        while at < len(data):
            n = next((n for n in range(min(self._longest, len(data) - at), 0, -1) if data[at : at + n] in self._ids), 0)
            if not n:
                return  # llguidance does without
            yield self._ids[data[at : at + n]]
            at += n


def _multiples(schema: Any) -> Iterable[int]:
    """Every multipleOf in a schema, in units of its last decimal place."""
    if isinstance(schema, Mapping):
        value = schema.get("multipleOf")
        if isinstance(value, int | float) and not isinstance(value, bool):
            digits = decimal.Decimal(str(value)).normalize().as_tuple().digits
            yield int("".join(map(str, digits)) or 0)  # no digits: NaN, which llguidance refuses
    if isinstance(schema, Mapping | list | tuple):
        for part in schema.values() if isinstance(schema, Mapping) else schema:
            yield from _multiples(part)


def _reason(message: str) -> str:
    """llguidance's own words in one line, without its state and the lines of the grammar that it shows."""
    if message.startswith("NoExtension"):
        return "no text fits it"
    lines = [line.strip() for line in re.split("<state>|<backtrace>", message)[0].splitlines()]
    text = " ".join(line for line in lines if line.strip("^") and not re.match(r"\d+ \|", line))
    return text if len(text) <= 400 else f"{text[:100]} … {text[-250:]}"


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise EngineError("grammars need llguidance, which is not installed; pip install 'konly[grammar]'") from None
    return llguidance


_lock = threading.Lock()
_stack_size = threading.Lock()  # Python has one for all threads to come
_vocabularies: weakref.WeakKeyDictionary[Tokenizer, _Vocabulary] = weakref.WeakKeyDictionary()
