"""LlamaGrammar: what llama-cpp-python's callers hand to `grammar=`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import EngineError
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
        return cls(grammar_of_schema(json_schema), json_schema)


def grammar_of(given: Any) -> Grammar | None:
    """konly's own of what callers give."""
    if given is None or isinstance(given, Grammar):
        return given
    if isinstance(given, LlamaGrammar):
        return given.grammar
    if isinstance(given, str):
        return LlamaGrammar.from_string(given).grammar
    raise LlamaError(f"grammar is of type {type(given).__name__}; expected a LlamaGrammar, a Grammar, or GBNF as text")


def grammar_of_schema(schema: Mapping[str, Any] | str) -> Grammar:
    """Of a JSON schema as llama.cpp reads it: objects have no other properties than those that they name.

    JSON Schema allows any others where `additionalProperties` is not given, and small models invent them without end.
    """
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        parted = '"allOf"' in json.dumps(value)  # then an object may be put together from parts that must stay open
        return Grammar.json_schema(value if parted else _closed(value))
    except (ValueError, TypeError, RecursionError) as error:
        raise LlamaError(f"the JSON schema is not JSON: {error}") from None


_OPEN = ("additionalProperties", "unevaluatedProperties", "patternProperties", "$ref")  # say it, or add to it
_SCHEMAS = ("items", "additionalProperties", "contains", "then", "else")
_LISTS = ("anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    closed = dict(schema)
    for name, value in schema.items():
        if name in _SCHEMAS:
            closed[name] = _closed(value)
        elif name in _LISTS and isinstance(value, list):
            closed[name] = [_closed(each) for each in value]
        elif name in _MAPS and isinstance(value, Mapping):
            closed[name] = {key: _closed(each) for key, each in value.items()}
    if isinstance(schema.get("properties"), Mapping) and not any(name in schema for name in _OPEN):
        closed["additionalProperties"] = False
    return closed
