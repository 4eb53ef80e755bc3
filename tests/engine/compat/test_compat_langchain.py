"""LangChain's own classes for llama.cpp, running on konly."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, Field

import engine.compat
from engine.engine import default_model

PROMPT = "Once upon a time"
# langchain-community says that it is no longer developed, and its classes use what others deprecate
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=99)


@pytest.fixture(scope="module", autouse=True)
def installed() -> Iterator[None]:
    if importlib.util.find_spec("langchain_community") is None:
        pytest.skip("langchain-community is not installed")
    before = set(sys.modules)
    engine.compat.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import langchain_community.chat_models.llamacpp
        import langchain_community.llms.llamacpp  # noqa: F401
    yield
    for name in set(sys.modules) - before:
        if name.split(".")[0] == "llama_cpp":
            del sys.modules[name]


SETTINGS: dict[str, Any] = {
    "model_path": default_model(), "n_ctx": 256, "temperature": 0.0, "max_tokens": 12, "verbose": False, "n_threads": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def llm(installed: None) -> Any:
    from langchain_community.llms.llamacpp import LlamaCpp

    return LlamaCpp(**SETTINGS)


@pytest.fixture(scope="module")
def chat(installed: None) -> Any:
    from langchain_community.chat_models.llamacpp import ChatLlamaCpp

    return ChatLlamaCpp(**SETTINGS | {"max_tokens": 60})


def test_invoke_gives_the_text_streaming_or_not(llm: Any) -> None:
    expected = llm.client(PROMPT, max_tokens=12, temperature=0, repeat_penalty=1.1)["choices"][0]["text"]
    assert llm.invoke(PROMPT) == expected
    llm.streaming = False
    try:
        assert llm.invoke(PROMPT) == expected
    finally:
        llm.streaming = True


def test_stream_gives_pieces_and_callbacks_get_each(llm: Any) -> None:
    from langchain_core.callbacks import BaseCallbackHandler

    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.tokens: list[str] = []

        def on_llm_new_token(self, token: str, **kwargs: Any) -> None:
            self.tokens.append(token)

    handler = Tokens()
    pieces = list(llm.stream(PROMPT, config={"callbacks": [handler]}))
    assert len(pieces) > 5
    assert "".join(pieces) == "".join(handler.tokens) == llm.invoke(PROMPT)


def test_stop_sequences_end_the_text(llm: Any) -> None:
    whole = llm.invoke(PROMPT)
    stop = whole[12:16]
    assert llm.invoke(PROMPT, stop=[stop]) == whole[: whole.index(stop)]


def test_tokens_are_counted(llm: Any) -> None:
    assert llm.get_num_tokens(PROMPT) == 5  # with BOS


def test_batches_run_in_threads(llm: Any) -> None:
    prompts = [PROMPT, "The dog", "A cat", "She said", "One day"]
    assert llm.batch(prompts) == [llm.invoke(prompt) for prompt in prompts]


def test_async_calls_work(llm: Any) -> None:
    assert asyncio.run(llm.ainvoke(PROMPT)) == llm.invoke(PROMPT)


def test_logprobs_are_in_the_generation(llm: Any) -> None:
    llm.logprobs = 2
    try:
        result = llm.generate([PROMPT])
        pieces = list(llm._stream(PROMPT))
    finally:
        llm.logprobs = None
    assert result.generations[0][0].text
    assert pieces[0].generation_info["logprobs"]["tokens"] == [pieces[0].text]


def test_a_grammar_of_langchains_is_kept_to(installed: None) -> None:
    from langchain_community.llms.llamacpp import LlamaCpp

    llm = LlamaCpp(**SETTINGS, grammar='root ::= "yes" | "no"')
    assert llm.invoke(PROMPT) in ("yes", "no")


def test_a_prompt_that_is_too_long_is_a_value_error(llm: Any) -> None:
    with pytest.raises(ValueError, match="exceed context window of 256"):
        llm.invoke("word " * 300)


def test_a_model_that_cannot_be_opened_says_why(installed: None) -> None:
    from langchain_community.llms.llamacpp import LlamaCpp

    with pytest.raises(ValueError, match="Received error none.gguf: no such file"):
        LlamaCpp(model_path="none.gguf")


def test_a_chain_of_prompt_model_and_parser_runs(llm: Any) -> None:
    from langchain_core.output_parsers import StrOutputParser
    from langchain_core.prompts import PromptTemplate

    chain = PromptTemplate.from_template("{start} upon a time") | llm | StrOutputParser()
    assert chain.invoke({"start": "Once"}) == llm.invoke(PROMPT)


def test_a_chat_answers_messages(chat: Any) -> None:
    messages = [("system", "You tell stories."), ("human", "Tell me one."), ("ai", "No."), ("human", "Please.")]
    answer = chat.invoke(messages)
    pieces = list(chat.stream(messages))
    assert answer.content == "".join(piece.content for piece in pieces) != ""
    assert answer.response_metadata["finish_reason"] in ("stop", "length")


def test_a_chat_stops_at_stop_sequences(chat: Any) -> None:
    whole = chat.invoke("Hello").content
    stop = whole[12:16]
    assert "".join(piece.content for piece in chat.stream("Hello", stop=[stop])) == whole[: whole.index(stop)]


def test_structured_output_is_an_object_of_the_class(chat: Any) -> None:
    person = chat.with_structured_output(Person).invoke("Tell me about a girl.")
    assert isinstance(person, Person)
    raw = chat.with_structured_output(Person, include_raw=True).invoke("Tell me about a girl.")
    assert raw["parsed"] == person
    assert raw["parsing_error"] is None


def test_a_bound_tool_is_called_streaming_or_not(chat: Any) -> None:
    bound = chat.bind_tools([Person], tool_choice="Person")
    (call,) = bound.invoke("Tell me about a girl.").tool_calls
    first, *rest = bound.stream("Tell me about a girl.")
    whole = sum(rest, first)
    assert call["name"] == whole.tool_calls[0]["name"] == "Person"
    assert call["args"] == whole.tool_calls[0]["args"]
    Person(**call["args"])


def test_a_conversation_with_a_tools_answer_goes_through_the_template(chat: Any) -> None:
    from langchain_core.messages import AIMessage, HumanMessage, ToolMessage

    call = {"name": "Person", "args": {"name": "Ann", "age": 9}, "id": "1", "type": "tool_call"}
    messages = [
        HumanMessage("Who is there?"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("Ann is nine.", tool_call_id="1"),
        HumanMessage("Thanks."),
    ]
    assert chat.invoke(messages).content


def test_json_is_asked_for_by_response_format(chat: Any) -> None:
    import json

    bound = chat.bind(response_format={"type": "json_object", "schema": Person.model_json_schema()})
    Person(**json.loads(bound.invoke("Tell me about a girl.").content))


def test_install_twice_is_once_and_a_real_llama_cpp_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    assert engine.compat.install() is engine.compat.install() is sys.modules["llama_cpp"]
    assert importlib.util.find_spec("llama_cpp") is not None
    monkeypatch.setitem(sys.modules, "llama_cpp", types.ModuleType("llama_cpp"))
    with pytest.raises(RuntimeError, match="imported already"):
        engine.compat.install()
