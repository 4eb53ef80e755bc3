"""create_chat_completion: messages in, OpenAI's chat objects out. A completion of what the template makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..grammar import Grammar
from . import completion
from .options import LlamaError

if TYPE_CHECKING:
    from .llama import Llama


@dataclass(frozen=True)
class ChatOptions:
    """Arguments of create_chat_completion after the messages, in llama-cpp-python's order. None: the default.

    tools            go to the template; `functions` are their old form
    tool_choice      {"type": "function", "function": {"name": …}}: the answer is a call of that tool, whose arguments
                     keep to its parameters; 'required' says so of a lone tool; 'auto' and 'none' leave it to the model
    response_format  {"type": "json_object", "schema": …} or {"type": "json_schema", "json_schema": {"schema": …}}
    logprobs, top_logprobs   whether, and with how many alternatives; LangChain sends the number as `logprobs`
    """

    functions: Sequence[Mapping[str, Any]] | None = None
    function_call: str | Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    temperature: float | None = 0.2
    top_p: float | None = 0.95
    top_k: int | None = 40
    min_p: float | None = 0.05
    typical_p: float | None = 1.0
    stream: bool | None = False
    stop: str | Sequence[str] | None = ()
    seed: int | None = None
    response_format: Mapping[str, Any] | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = 0.0
    frequency_penalty: float | None = 0.0
    repeat_penalty: float | None = 1.0
    tfs_z: float | None = 1.0
    mirostat_mode: int | None = 0
    mirostat_tau: float | None = 5.0
    mirostat_eta: float | None = 0.1
    model: str | None = None
    logits_processor: Any = None
    grammar: Any = None
    logit_bias: Mapping[Any, float] | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None


def create(llama: Llama, messages: Any, options: ChatOptions) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """OpenAI's object, or its chunks if options.stream."""
    if llama._template is None:
        raise LlamaError("this model has no chat template; put the prompt together, and take create_completion")
    tools = _tools(options)
    tool = _chosen(options, tools)
    ids = llama._template.tokens(messages, tools=tools)
    request = completion.requested(llama, ids, _completion_options(options, tool))
    if options.stream:
        chunks = completion._chunks(request)
        return _text_chunks(chunks) if tool is None else _call_chunks(chunks, tool)
    whole = completion._whole(request)
    choice = whole["choices"][0]
    if tool is None:
        message: dict[str, Any] = {"role": "assistant", "content": choice["text"]}
        finish_reason = choice["finish_reason"]
    else:
        call = {"name": _name(tool), "arguments": choice["text"]}
        calls = [{"id": _call_id(tool, whole), "type": "function", "function": call}]
        message = {"role": "assistant", "content": None, "function_call": call, "tool_calls": calls}
        finish_reason = _finish_of_call(choice["finish_reason"])
    logprobs = _chat_logprobs(choice["logprobs"])
    answer = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}
    return _head(whole, "chat.completion") | {"choices": [answer], "usage": whole["usage"]}


def named(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """All arguments by name, for a handler of the caller's."""
    options = ChatOptions(*arguments, **keywords)
    return {f.name: getattr(options, f.name) for f in fields(options)}


def _completion_options(options: ChatOptions, tool: Mapping[str, Any] | None) -> completion.Options:
    known = {f.name for f in fields(completion.Options)} - {"logprobs", "grammar"}
    shared = {f.name: getattr(options, f.name) for f in fields(options) if f.name in known}
    return completion.Options(**shared, logprobs=_n_logprobs(options), grammar=_grammar(options, tool))


def _n_logprobs(options: ChatOptions) -> int | None:
    if options.logprobs is None or options.logprobs is False:
        return None
    if options.top_logprobs is not None:
        return options.top_logprobs
    return 0 if options.logprobs is True else options.logprobs


def _grammar(options: ChatOptions, tool: Mapping[str, Any] | None) -> Any:
    if tool is not None:
        return Grammar.json_schema(tool["function"].get("parameters") or {"type": "object"})
    wanted = options.response_format
    if wanted is None:
        return options.grammar
    kind = wanted.get("type") if isinstance(wanted, Mapping) else wanted
    if kind == "json_object":
        return Grammar.json_schema(wanted.get("schema") or {"type": "object"})
    if kind == "json_schema":
        inner = wanted.get("json_schema")
        if not isinstance(inner, Mapping) or "schema" not in inner:
            raise LlamaError("response_format: 'json_schema' has no 'schema'")
        return Grammar.json_schema(inner["schema"])
    if kind != "text":
        raise LlamaError(f"response_format is of type {kind!r}; expected 'text', 'json_object' or 'json_schema'")
    return options.grammar


# ---------------------------------------------------------------------------------------------------------- tools


def _tools(options: ChatOptions) -> list[Mapping[str, Any]] | None:
    tools = list(options.tools or ()) + [{"type": "function", "function": f} for f in options.functions or ()]
    for tool in tools:
        if (
            not isinstance(tool, Mapping)
            or not isinstance(tool.get("function"), Mapping)
            or "name" not in tool["function"]
        ):
            raise LlamaError("tools: expected {'type': 'function', 'function': {'name': …, 'parameters': …}} each")
    return tools or None


def _chosen(options: ChatOptions, tools: list[Mapping[str, Any]] | None) -> Mapping[str, Any] | None:
    """The tool that the answer has to be a call of."""
    choice = options.tool_choice if options.tool_choice is not None else options.function_call
    if choice in (None, "auto", "none"):
        return None
    if choice == "required":
        if tools is None or len(tools) != 1:
            raise LlamaError("tool_choice 'required' needs exactly one tool; name the one to call")
        return tools[0]
    name: Any = choice
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        name = function.get("name") if isinstance(function, Mapping) else None
    for tool in tools or ():
        if _name(tool) == name:
            return tool
    raise LlamaError(f"tool_choice: tool {name!r} is not among the tools")


def _name(tool: Mapping[str, Any]) -> str:
    return str(tool["function"]["name"])


def _call_id(tool: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    return f"call__0_{_name(tool)}_{whole['id']}"


def _finish_of_call(finish_reason: str | None) -> str | None:
    """'length' stays: the arguments are cut off."""
    return "tool_calls" if finish_reason == "stop" else finish_reason


# --------------------------------------------------------------------------------------------------------- chunks


def _text_chunks(chunks: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return _chat_chunks(chunks, lambda text, chunk: {"content": text}, lambda reason: reason)


def _call_chunks(chunks: Iterator[dict[str, Any]], tool: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    begun = False

    def delta(text: str, chunk: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal begun
        call: dict[str, Any] = {"index": 0, "function": {"arguments": text}}
        if not begun:
            begun = True
            call = {
                "index": 0,
                "id": _call_id(tool, chunk),
                "type": "function",
                "function": {"name": _name(tool), "arguments": text},
            }
        return {"content": None, "tool_calls": [call]}

    return _chat_chunks(chunks, delta, _finish_of_call)


def _chat_chunks(
    chunks: Iterator[dict[str, Any]],
    delta: Callable[[str, Mapping[str, Any]], dict[str, Any]],
    finish: Callable[[str | None], str | None],
) -> Iterator[dict[str, Any]]:
    """The role first, then a delta for each chunk, at last an empty one with the finish_reason."""
    first = True
    for chunk in chunks:
        head = _head(chunk, "chat.completion.chunk")
        if first:
            first = False
            yield head | {"choices": [_delta({"role": "assistant"}, None, None)]}
        choice = chunk["choices"][0]
        if choice["finish_reason"] is None:
            yield head | {"choices": [_delta(delta(choice["text"], chunk), _chat_logprobs(choice["logprobs"]), None)]}
        else:
            yield head | {"choices": [_delta({}, None, finish(choice["finish_reason"]))]}


def _delta(delta: dict[str, Any], logprobs: dict[str, Any] | None, finish_reason: str | None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def _head(whole: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return {"id": f"chat{whole['id']}", "object": kind, "created": whole["created"], "model": whole["model"]}


def _chat_logprobs(given: completion.Logprobs | None) -> dict[str, Any] | None:
    """OpenAI's, of chats: a list of tokens with their bytes and alternatives."""
    if given is None:
        return None

    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    content = [
        entry(token, logprob) | {"top_logprobs": [entry(*other) for other in top.items()]}
        for token, logprob, top in zip(given["tokens"], given["token_logprobs"], given["top_logprobs"])
    ]
    return {"content": content, "refusal": None}
