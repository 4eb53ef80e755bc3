"""Chat templates: a conversation as the tokens that the model was trained to see.

    messages ─ template ─► pieces: text | control token | tokens of an earlier answer ─► ids

The template is a jinja2 program in the file (sandbox.py runs it). It writes control tokens by their names, between
texts of the user, who may write the same names. They are told apart where the template is compiled: in its own text a
name is replaced by a mark that nobody can guess, and after rendering only marks become control tokens. What is between
two marks is tokenised in one piece, so ordinary text becomes the same tokens as in the whole.

Some templates put a name together: '<|' + message['role'] + '|>'. Such a name counts only if it is there, too, when
each text of the messages is replaced by x's.

Source: transformers, utils/chat_template_utils.py, for the variables, filters and functions that a template may use.
"""

from __future__ import annotations

import functools
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import EngineError
from ..tokenizer import Tokenizer
from .messages import checked_messages, checked_tools, checked_variables, forms, mapped_texts, units
from .sandbox import Sandbox

KEY = "tokenizer.chat_template"
MAX_CONTROL = 10_000  # control tokens; models have some hundreds

BUILTIN = {  # what may be asked for by name
    "plain": (
        "{% for m in messages %}{% if m.role == 'user' and not loop.first %}{{ '\\n' }}{% endif %}{{ m.content }}"
        "{% endfor %}"
    ),
}

Messages = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """A template over a tokenizer. May be used by several threads.

    A message is {"role": …, "content": text or [{"type": "text", "text": …}]}; an assistant's may have "tool_calls" and
    "reasoning_content", a tool's "tool_call_id" and "name". An assistant's may also carry "tokens": the ids of its
    content as the model generated them, which are then taken instead of tokenising the content.
    """

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of a GGUF file, with its variant for tools, if it has one. None: the file has no template."""
        source = metadata.get(KEY)
        if source is None:
            source = metadata.get(f"{KEY}.default")
        with_tools = metadata.get(f"{KEY}.tool_use")
        for key, value in ((KEY, source), (f"{KEY}.tool_use", with_tools)):
            if value is not None and not isinstance(value, str):
                raise EngineError(f"key {key!r} is of type {type(value).__name__}; expected a text")
        return cls(source, tokenizer, with_tools) if source else None

    def __init__(self, source: str, tokenizer: Tokenizer, with_tools: str | None = None) -> None:
        """with_tools: the source to use where there are tools, if it is another."""
        self.source = source
        self._tokenizer = tokenizer
        self._nonce = secrets.token_hex(8)
        self._names = {name: i for i, name in _control_tokens(tokenizer)}
        self._control = frozenset(self._names.values())
        if len(self._names) > MAX_CONTROL:
            raise EngineError(f"{len(self._names):,} control tokens are more than {MAX_CONTROL:,}: no chat template")
        longest_first = sorted(self._names, key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._marked = re.compile(f"\U0010fffd{self._nonce}([tb])([0-9]{{1,9}})\U0010fffd")
        self._plain = Sandbox(source, self._mark)
        self._with_tools = Sandbox(with_tools, self._mark) if with_tools else self._plain
        self._lock = threading.Lock()

    def text(
        self, messages: Messages, *, tools: Any = None, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """What the template writes, control tokens by their names."""
        given = _checked(messages, tools, add_generation_prompt, variables)
        for message in given["messages"]:
            message.pop("tokens", None)
        return "".join(self._name(part) if isinstance(part, int) else part for part in self._parts(self._render(given)))

    def tokens(
        self, messages: Messages, *, tools: Any = None, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The ids, with BOS once if the model wants it."""
        given = _checked(messages, tools, add_generation_prompt, variables)
        answers: list[list[int]] = []
        for message in given["messages"]:
            if (tokens := message.pop("tokens", None)) is not None and message["content"]:
                message["content"] = f"\U0010fffd{self._nonce}b{len(answers)}\U0010fffd"
                answers.append(tokens)
        parts = self._parts(self._render(given), answers)
        if any(name in part for part in parts if isinstance(part, str) for name in self._names):
            parts = self._composed(given, answers, parts)
        ids = self._encode(parts)
        bos = self._tokenizer.bos_id if self._tokenizer.add_bos else None
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    # ------------------------------------------------------------------------------------------------------- rendering

    def _render(self, given: dict[str, Any]) -> str:
        """In the first form of the messages that the template does not fail with."""
        sandbox = self._with_tools if given["tools"] else self._plain
        variables = dict(given)
        for name, token in (("bos_token", self._tokenizer.bos_id), ("eos_token", self._tokenizer.eos_id)):
            if token is not None:
                variables[name] = self._mark(self._name(token))
        failure = None
        with self._lock:
            for messages in forms(given["messages"]):
                try:
                    return sandbox.render({**variables, "messages": messages}, units(given))
                except EngineError as error:
                    failure = failure or error
        assert failure is not None
        raise failure

    def _mark(self, text: str) -> str:
        return self._spelled.sub(lambda found: f"\U0010fffd{self._nonce}t{self._names[found[0]]}\U0010fffd", text)

    def _name(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

    def _parts(self, text: str, answers: Sequence[list[int]] = ()) -> list[str | int]:
        """The rendered text cut at its marks; an answer takes the place of its mark."""
        parts: list[str | int] = []
        end = 0
        for found in self._marked.finditer(text):
            parts.append(text[end : found.start()])
            end, number = found.end(), int(found[2])
            if found[1] == "t" and number in self._control:  # a template sees the mark of BOS, and can forge others
                parts.append(number)
            elif found[1] == "b" and number < len(answers):
                _append_answer(parts, answers[number], self._tokenizer)
        parts.append(text[end:])
        return [part for part in parts if part != ""]

    def _encode(self, parts: Sequence[str | int]) -> list[int]:
        ids: list[int] = []
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._tokenizer.encode(part, add_special=False)
        return ids

    # -------------------------------------------------------------------------------------- names that are put together

    def _composed(self, given: dict[str, Any], answers: list[list[int]], parts: list[str | int]) -> list[str | int]:
        """parts, with control tokens also where the template puts their names together."""
        neutral = self._parts(self._render(mapped_texts(given, lambda text: re.sub(r"\S", "x", text))))
        wanted = self._composed_names(neutral)
        if not wanted:
            return parts
        cut = f"\U0010fffc{self._nonce}\U0010fffc"
        broken = mapped_texts(given, lambda text: self._broken(text, cut))
        safe = self._parts(self._render(broken), answers)
        if self._composed_names(safe) != wanted:
            return parts
        out: list[str | int] = []
        for part in safe:
            pieces = [part] if isinstance(part, int) else re.split(f"({self._spelled.pattern})", part)
            for piece in pieces:
                if isinstance(piece, str):
                    piece = self._names.get(piece, piece.replace(cut, ""))
                if piece != "":
                    out.append(piece)
        return out

    def _composed_names(self, parts: Sequence[str | int]) -> list[str]:
        return [name for part in parts if isinstance(part, str) for name in self._spelled.findall(part)]

    def _broken(self, text: str, cut: str) -> str:
        """The text with something in each name of a control token, and where one may end or begin in it."""
        if self._marked.fullmatch(text):
            return text
        text = self._spelled.sub(lambda found: found[0][:1] + cut + found[0][1:], text)
        heads, tails, longest = self._halves
        lengths = range(1, min(len(text), longest) + 1)
        head = any(text[:n] in tails for n in lengths)
        tail = any(text[-n:] in heads for n in lengths)
        return (cut if head else "") + text + (cut if tail else "")

    @functools.cached_property
    def _halves(self) -> tuple[frozenset[str], frozenset[str], int]:
        """What names begin with, what they end with, and the length of the longest."""
        cuts = [(name[:i], name[i:]) for name in self._names for i in range(1, len(name))]
        heads, tails = frozenset(head for head, _ in cuts), frozenset(tail for _, tail in cuts)
        return heads, tails, max(map(len, self._names), default=0)


def _control_tokens(tokenizer: Tokenizer) -> list[tuple[int, str]]:
    """Names that cannot be written, and single characters, are none that a template would spell."""
    found = ((i, tokenizer.token_bytes(i)) for i in range(tokenizer.n_vocab) if tokenizer.is_control(i))
    texts = [(i, raw.decode("utf-8", "replace")) for i, raw in found]
    return [(i, text) for i, text in reversed(texts) if len(text) > 1 and "\ufffd" not in text]


def _append_answer(parts: list[str | int], answer: Sequence[int], tokenizer: Tokenizer) -> None:
    """The tokens of an answer; white space that they begin with is not written a second time."""
    if parts and isinstance(parts[-1], str):
        space = parts[-1][len(parts[-1].rstrip()) :]
        if space and tokenizer.decode(answer, at_start=False).startswith(space):
            parts[-1] = parts[-1][: -len(space)]
    parts += answer


def _checked(
    messages: Messages, tools: Any, add_generation_prompt: bool, variables: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        **checked_variables(variables),
        "messages": checked_messages(messages),
        "tools": checked_tools(tools),
        "add_generation_prompt": bool(add_generation_prompt),
    }
