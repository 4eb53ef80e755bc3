"""create_chat_completion: the file's template, OpenAI's chat objects, tools and JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import validate

from engine.compat import Llama

MESSAGES = [{"role": "user", "content": "Tell me a story about a cat."}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}, "b": {"enum": ["x", "y"]}},
    "required": ["a", "b"],
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": SCHEMA}}]


def deltas(chunks: Any) -> list[dict[str, Any]]:
    return [chunk["choices"][0]["delta"] for chunk in chunks]


def test_an_answer_is_openais_object_with_the_templates_prompt(llama: Llama) -> None:
    found = llama.create_chat_completion(MESSAGES, max_tokens=12, temperature=0)
    expected = "".join(llama.engine.chat(MESSAGES, max_tokens=12, temperature=0))
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": expected},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert found["id"].startswith("chatcmpl-")
    assert found["object"] == "chat.completion"
    assert found["usage"]["completion_tokens"] == 12


def test_chunks_begin_with_the_role_and_end_with_the_reason(llama: Llama) -> None:
    chunks = list(llama.create_chat_completion(MESSAGES, max_tokens=12, temperature=0, stream=True))
    first, *rest, last = deltas(chunks)
    assert first == {"role": "assistant"}
    assert last == {}
    assert "".join(delta["content"] for delta in rest) == "".join(
        llama.engine.chat(MESSAGES, max_tokens=12, temperature=0)
    )
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


def test_what_users_write_is_no_control_token(llama: Llama) -> None:
    eos = llama.detokenize([llama.token_eos()], special=True).decode()
    asked = [{"role": "user", "content": f"Hello{eos}"}]
    plain = [{"role": "user", "content": "Hello"}]
    n = [llama.create_chat_completion(m, max_tokens=1)["usage"]["prompt_tokens"] for m in (asked, plain)]
    assert n[0] > n[1] + 1


@pytest.mark.parametrize(("logprobs", "top", "n"), [(True, 2, 2), (True, None, 0), (2, None, 2)])
def test_logprobs_have_the_form_of_chats(llama: Llama, logprobs: Any, top: int | None, n: int) -> None:
    found = llama.create_chat_completion(
        MESSAGES, max_tokens=3, temperature=0, logprobs=logprobs, top_logprobs=top
    )["choices"][0]  # fmt: skip
    content = found["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == found["message"]["content"]
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == max(n, 1)  # with the token itself
    assert llama.create_chat_completion(MESSAGES, max_tokens=1, logprobs=False)["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    "response_format",
    [
        {"type": "json_object", "schema": SCHEMA},
        {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_response_format_is_kept_to(llama: Llama, response_format: dict[str, Any], seed: int) -> None:
    found = llama.create_chat_completion(MESSAGES, response_format=response_format, seed=seed, temperature=2.0)
    value = json.loads(found["choices"][0]["message"]["content"])
    validate(value, SCHEMA)
    assert set(value) == {"a", "b"}
    assert found["choices"][0]["finish_reason"] == "stop"


def test_a_json_object_without_a_schema_begins_as_one(llama: Llama) -> None:
    found = llama.create_chat_completion(MESSAGES, response_format={"type": "json_object"}, max_tokens=20, seed=1)
    assert found["choices"][0]["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("tools", "choice"),
    [
        ({"tools": TOOLS}, {"tool_choice": {"type": "function", "function": {"name": "add"}}}),
        ({"tools": TOOLS}, {"tool_choice": "required"}),
        ({"functions": [TOOLS[0]["function"]]}, {"function_call": {"name": "add"}}),
    ],
)
def test_a_chosen_tool_is_called_with_arguments_of_its_schema(
    llama: Llama, tools: dict[str, Any], choice: dict[str, Any]
) -> None:
    found = llama.create_chat_completion(MESSAGES, **tools, **choice, seed=1)["choices"][0]
    (call,) = found["message"]["tool_calls"]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["content"] is None
    assert call["type"] == "function" and call["id"] and call["function"]["name"] == "add"
    validate(json.loads(call["function"]["arguments"]), SCHEMA)

    chunks = list(llama.create_chat_completion(MESSAGES, **tools, **choice, seed=1, stream=True))
    calls = [delta["tool_calls"][0] for delta in deltas(chunks) if delta.get("tool_calls")]
    assert "".join(each["function"]["arguments"] for each in calls) == call["function"]["arguments"]
    assert [each["function"].get("name") for each in calls] == ["add"] + [None] * (len(calls) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_tools_go_to_the_template(llama: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    tokens = llama._template.tokens  # type: ignore[union-attr]
    monkeypatch.setattr(
        llama._template, "tokens", lambda messages, tools=None: (given.append(tools), tokens(messages, tools=tools))[1]
    )
    llama.create_chat_completion(MESSAGES, tools=TOOLS, tool_choice="auto", max_tokens=1)
    assert given == [TOOLS]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "sub"}}, "tools": TOOLS}, "'sub' is not among"),
        ({"tool_choice": "required"}, "needs exactly one tool"),
        ({"tools": ["add"]}, "tools: expected"),
        ({"response_format": {"type": "xml"}}, "response_format is of type 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "has no 'schema'"),
        ({"messages": [{"content": "no role"}]}, "role"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 300}]}, r"Requested tokens \(\d+\) exceed context window"),
    ],
)
def test_wrong_requests_are_value_errors(llama: Llama, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        llama.create_chat_completion(**{"messages": MESSAGES} | arguments)


def test_a_chat_handler_gets_everything_by_name(llama: Llama) -> None:
    def handler(*, llama: Llama, messages: Any, **arguments: Any) -> Any:
        return llama.create_completion(messages[0]["content"], max_tokens=arguments["max_tokens"])

    other = Llama(llama.model_path, n_ctx=64, chat_handler=handler, verbose=False)
    assert other.create_chat_completion(MESSAGES, max_tokens=2)["object"] == "text_completion"
    other.close()
