"""closed(): a JSON schema with its objects closed: they have no other properties than those that they name.

JSON Schema allows any others where `additionalProperties` is not given, and small models invent them without end.
llama.cpp closes them (grammars/README.md), OpenAI's structured outputs take no open ones, and so it is here. A schema
that gives `additionalProperties`, true or another schema, is taken at its word.

An object that is put together of several schemas cannot be closed part by part, for each would forbid what the others
name. Where one is in it, a schema is left as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_SAYS = ("additionalProperties", "unevaluatedProperties", "patternProperties")
_BESIDE = ("anyOf", "oneOf", "allOf", "if", "dependentSchemas", "$ref")  # more of the same object
_SCHEMAS = ("items", "additionalProperties", "contains", "then", "else")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def closed(schema: Any) -> Any:
    """A closed copy."""
    return schema if any(map(_is_part, _all(schema))) else _closed(schema)


def _all(schema: Any) -> Iterator[Mapping[str, Any]]:
    """A schema and all schemas within it."""
    if isinstance(schema, Mapping):
        yield schema
        for name in _SCHEMAS:
            yield from _all(schema.get(name))
        for name in _LISTS:
            inner = schema.get(name)
            for each in inner if isinstance(inner, list | tuple) else ():
                yield from _all(each)
        for name in _MAPS:
            inner = schema.get(name)
            for each in inner.values() if isinstance(inner, Mapping) else ():
                yield from _all(each)


def _is_part(schema: Mapping[str, Any]) -> bool:
    parts = schema.get("allOf")
    several = isinstance(parts, list | tuple) and len(parts) > 1  # one is the object itself: so Pydantic 1 refers to it
    return several or ("properties" in schema and any(name in schema for name in _BESIDE))


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    copy = dict(schema)
    for name, value in schema.items():
        if name in _SCHEMAS:
            copy[name] = _closed(value)
        elif name in _LISTS and isinstance(value, list | tuple):
            copy[name] = [_closed(each) for each in value]
        elif name in _MAPS and isinstance(value, Mapping):
            copy[name] = {key: _closed(each) for key, each in value.items()}
    properties = schema.get("properties")
    if isinstance(properties, Mapping) and not any(name in schema for name in _SAYS):
        copy["additionalProperties"] = False
    return copy
