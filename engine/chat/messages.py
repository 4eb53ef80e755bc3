"""Messages of a conversation, as they come from a caller: checked, and in the one form that templates see."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import EngineError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "observation", "model")
MAX_DEPTH = 32  # of the objects in tool calls and tools

_RESERVED = {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "raise_exception", "strftime_now"}


class Arguments(dict[str, Any]):
    """Of a tool call; a template that prints them gets JSON."""

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies of the messages, content as text (None where there is none). EngineError says which is wrong, and how."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise EngineError(f"messages is of type {type(messages).__name__}; expected a list of messages")
    if not messages:
        raise EngineError("messages is empty; expected at least one message")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise EngineError(f"{where} is of type {type(message).__name__}; expected a dict with 'role' and 'content'")
    made = {str(key): _json(f"{where}[{key!r}]", value) for key, value in message.items() if key != "tokens"}
    role = made.get("role")
    if role not in ROLES:
        raise EngineError(f"{where} has the role {role!r}; expected one of {', '.join(ROLES)}")
    made["content"] = _content(where, made.get("content"))
    calls = made.get("tool_calls")
    if calls is None:
        made.pop("tool_calls", None)
    else:
        made["tool_calls"] = _tool_calls(where, calls)
    if made["content"] is None and not calls:
        raise EngineError(f"{where} has no 'content'; expected a text, or 'tool_calls'")
    for key in ("name", "tool_call_id", "reasoning_content"):
        if made.get(key) is None:
            made.pop(key, None)
        elif not isinstance(made[key], str):
            raise EngineError(f"{where}[{key!r}] is of type {type(made[key]).__name__}; expected a text")
    if message.get("tokens") is not None:
        made["tokens"] = _tokens(where, message["tokens"])
    return made


def _content(where: str, content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise EngineError(f"{where}['content'] is of type {type(content).__name__}; expected a text or a list of parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind is None or (kind == "text" and not isinstance(part.get("text"), str)):
            raise EngineError(f"{where}['content'][{i}] is not a part; expected {{'type': 'text', 'text': …}}")
        if kind != "text":
            raise EngineError(f"{where}['content'][{i}] is of type {kind!r}; konly reads text only")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Arguments as an object, whether they came as one or as JSON."""
    if not isinstance(calls, list):
        raise EngineError(f"{where}['tool_calls'] is of type {type(calls).__name__}; expected a list")
    made = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise EngineError(
                f"{where}['tool_calls'][{i}] is not a call; expected {{'function': {{'name': …, 'arguments': …}}}}"
            )
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise EngineError(
                f"{where}['tool_calls'][{i}]['function']['arguments'] is not an object; expected one, or its JSON"
            )
        arguments = Arguments(_json("arguments", arguments))
        made.append({"type": "function", **call, "function": {**function, "arguments": arguments}})
    return made


def _tokens(where: str, tokens: Any) -> list[int]:
    if not isinstance(tokens, list) or not all(isinstance(token, int) and token >= 0 for token in tokens):
        raise EngineError(f"{where}['tokens'] is not a list of token ids")
    return tokens


def checked_tools(tools: Any) -> list[Any] | None:
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise EngineError("tools: expected a list of objects like {'type': 'function', 'function': {'name': …}}")
    made: list[Any] = _json("tools", tools)
    return made


def checked_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """What a caller wants to say to the template beyond the messages: enable_thinking=False."""
    for name in variables:
        if name in _RESERVED or not re.fullmatch("[a-z][a-z0-9_]{0,63}", name):
            raise EngineError(f"a chat template takes no variable {name!r} from a caller")
    made: dict[str, Any] = _json("template variables", dict(variables))
    return made


def _json(where: str, value: Any, depth: int = 0) -> Any:
    """A copy of what JSON can say."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise EngineError(f"{where} is not valid Unicode: a lone surrogate at character {error.start}") from None
        return value
    if depth >= MAX_DEPTH:
        raise EngineError(f"{where} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {_json(where, key): _json(where, one, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(where, one, depth + 1) for one in value]
    raise EngineError(f"{where} holds a value of type {type(value).__name__}; expected what JSON can say")


def forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The messages as one template or another understands them: tool calls differ from model to model.

    Arguments are an object (GLM, Kimi) or JSON text (DeepSeek); content that is None is left out, as transformers 5
    does it, or is None (DeepSeek's ask for that).
    """
    calls = any(message.get("tool_calls") for message in messages)
    without = any(message["content"] is None for message in messages)
    for none in (False, True) if without else (False,):
        for text in (False, True) if calls else (False,):
            yield [_form(message, none, text) for message in messages]


def _form(message: dict[str, Any], none: bool, text: bool) -> dict[str, Any]:
    made = dict(message)
    if message["content"] is None and not none:
        del made["content"]
    if text and "tool_calls" in message:
        made["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": str(call["function"]["arguments"])}}
            for call in message["tool_calls"]
        ]
    return made


def mapped_texts(given: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """The same conversation with every text in it changed; roles, types of things and keys that are names stay."""

    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, str):
            return value if key in ("role", "type") else change(value)
        if isinstance(value, dict):
            return type(value)({n if n.isidentifier() else change(n): walk(one, n) for n, one in value.items()})
        if isinstance(value, list):
            return [walk(one) for one in value]
        return value

    made: dict[str, Any] = walk(given)
    return made


def units(value: Any) -> int:
    """Characters and items in it."""
    if isinstance(value, str):
        return len(value) + 1
    if isinstance(value, dict):
        return sum(units(key) + units(one) for key, one in value.items()) + 1
    if isinstance(value, list):
        return sum(map(units, value)) + 1
    return 1
