"""LlamaGrammar: what llama-cpp-python's callers hand to `grammar=`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import EngineError, GrammarError
from ..grammar import Grammar
from .options import LlamaError

MAX_BYTES = 1 << 20


class LlamaGrammar:
    """Made of llama.cpp's notation (GBNF) or of a JSON schema; llguidance follows it."""

    def __init__(self, grammar: Grammar, text: str = "") -> None:
        self.grammar = grammar
        self._grammar = text  # as llama-cpp-python calls it

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:
        """Of a GBNF text. What GBNF can say and Lark can't is a LlamaError."""
        try:
            from llguidance import gbnf_to_lark
        except ImportError:
            raise EngineError(
                "grammars need llguidance, which is not installed; pip install 'konly[grammar]'"
            ) from None
        if not isinstance(grammar, str) or len(grammar) > MAX_BYTES:
            raise LlamaError(f"grammar: expected GBNF as text of at most {MAX_BYTES:,} characters")
        try:
            lark = gbnf_to_lark.gbnf_to_lark(grammar)
        except Exception as error:  # it raises Exception itself
            raise LlamaError(f"grammar: this GBNF cannot be read: {' '.join(str(error).split())}") from None
        return cls(Grammar.lark(lark), grammar)

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], verbose: bool = True) -> LlamaGrammar:
        """Of a GBNF file."""
        try:
            with open(Path(file), encoding="utf-8") as opened:
                text = opened.read(MAX_BYTES + 1)
        except (OSError, UnicodeError) as error:
            raise LlamaError(f"{file}: the grammar cannot be read: {error}") from None
        return cls.from_string(text, verbose)

    @classmethod
    def from_json_schema(cls, json_schema: str, verbose: bool = True) -> LlamaGrammar:
        """Of a JSON schema, as text."""
        try:
            return cls(Grammar.json_schema(json_schema), json_schema)
        except GrammarError as error:
            raise LlamaError(str(error)) from None


def grammar_of(given: Any) -> Grammar | None:
    """konly's own of what callers give."""
    if given is None or isinstance(given, Grammar):
        return given
    if isinstance(given, LlamaGrammar):
        return given.grammar
    if isinstance(given, str):
        return LlamaGrammar.from_string(given).grammar
    raise LlamaError(f"grammar is of type {type(given).__name__}; expected a LlamaGrammar, a Grammar, or GBNF as text")
