"""A conversation: messages on one side, a stream that holds their tokens on the other, a chat template between them.

    user's text ─► messages ─ template ─► ids ─ stream.stream_generate ─► pieces ─► the answer, kept with its ids

An answer is never tokenised again: its ids go into the next prompt as they were generated, so that the prompt begins
with what the cache holds, and only what is new is computed. Thinking is not part of the history: its models' templates
want it so. When the next prompt does not fit, the oldest exchanges are left out, and their rows taken out of the cache
by a shift; an answer that is longer than what is left forgets as it goes. What comes before the first question stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ContextFullError, EngineError, SessionError
from ..prefixes import common
from .messages import checked_messages
from .template import ChatTemplate

if TYPE_CHECKING:
    from ..sampling import Sampling
    from ..stream import Stream

OPEN, CLOSE = "<think>", "</think>"
MIN_SHIFT = 32  # tokens in the cache for which a shift is worth its trouble


@dataclass(frozen=True)
class Piece:
    """Text to show; thinking: it is not part of the answer."""

    text: str
    thinking: bool = False


class Conversation:
    """messages: the exchanges so far, whole; the first `n_forgotten` of them are no longer told to the model."""

    def __init__(
        self,
        stream: Stream,
        template: ChatTemplate,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        system: str | None = None,
        **arguments: Any,
    ) -> None:
        """arguments: others of stream_generate."""
        self.stream, self.template = stream, template
        self.system = system or None
        self.messages: list[dict[str, Any]] = []
        self.n_forgotten = 0
        self._arguments = {"sampling": sampling, "max_tokens": max_tokens, "context_shift": True, **arguments}

    def answer(self, text: str, progress: Callable[[int, int], None] | None = None) -> Generator[Piece, None, None]:
        """Ask, and give the answer as it comes. Closed, or stopped by Ctrl-C, it keeps what was answered so far.

        ContextFullError if the text alone is too long for the context: the conversation is then as it was.
        """
        asked = {"role": "user", "content": text}
        ids = self._fitting(asked)
        n_keep = min(self._n_keep(), self.stream.n_ctx // 2)
        responses = self.stream.stream_generate(ids, progress=progress, n_keep=n_keep, **self._arguments)
        answer = _Answer(self.stream, ids)
        try:
            for response in responses:
                yield from answer.push(response.text, None if response.finish_reason else response.token)
            yield from answer.flush()
        finally:
            responses.close()
            if message := answer.message():
                self.messages += [asked, message]

    def undo(self) -> str | None:
        """Take the last question and its answer back; the question."""
        if not self.messages:
            return None
        asked = self.messages[-2]["content"]
        del self.messages[-2:]
        self.n_forgotten = 0  # there may be room again
        return str(asked)

    def reset(self) -> None:
        """Begin anew, with the same system prompt."""
        self.messages, self.n_forgotten = [], 0
        self.stream.clear()

    def save(self, path: str | os.PathLike[str]) -> None:
        chat = {"system": self.system, "messages": self.messages, "n_forgotten": self.n_forgotten}
        self.stream.save(path, {"chat": chat})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on where save() was called. SessionError if the file is not of a conversation with this model."""
        chat: Any = self.stream.load(path).get("chat")
        try:
            system, n_forgotten = chat["system"], chat["n_forgotten"]
            messages = checked_messages(chat["messages"]) if chat["messages"] else []
            roles = [message["role"] for message in messages]
            in_order = roles == ["user", "assistant"] * (len(roles) // 2)
            if not in_order or n_forgotten not in range(0, len(roles) + 1, 2) or not isinstance(system, str | None):
                raise EngineError("its messages are not in order")
        except (TypeError, KeyError, EngineError) as error:
            self.stream.clear()
            raise SessionError(f"{os.fspath(path)}: is not a conversation that `konly chat` saved ({error})") from None
        self.system, self.messages, self.n_forgotten = system, messages, n_forgotten

    # ------------------------------------------------------------------------------------------------ the next prompt

    def _prompt(self, asked: dict[str, Any], n_forgotten: int) -> list[int]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.template.tokens([*system, *self.messages[n_forgotten:], asked])

    def _fitting(self, asked: dict[str, Any]) -> list[int]:
        """The ids of the next prompt, without the oldest exchanges where they would leave no room for an answer."""
        stream = self.stream
        limit = self._arguments["max_tokens"]
        room = stream.n_ctx - min(stream.n_ctx // 4, limit if limit is not None else stream.n_ctx)
        n_forgotten = self.n_forgotten
        whole = ids = self._prompt(asked, n_forgotten)
        while len(ids) > room and n_forgotten < len(self.messages):
            n_forgotten += 2
            ids = self._prompt(asked, n_forgotten)
        if len(ids) > stream.n_ctx:
            raise ContextFullError(
                f"a message of {len(ids):,} tokens does not fit n_ctx={stream.n_ctx};"
                " raise n_ctx (--ctx-size) or shorten it"
            )
        self.n_forgotten = n_forgotten
        if len(ids) < len(whole):
            self._shift(ids, len(whole) - len(ids))
        return ids

    def _shift(self, ids: list[int], n_gone: int) -> None:
        """Take n_gone tokens out of the cache, if what is behind them goes on as the prompt does."""
        held = self.stream.tokens
        n = common(held, ids)
        if n_gone > 0 and common(held[n + n_gone :], ids[n:]) >= MIN_SHIFT:
            self.stream.shift(n, n_gone)

    def _n_keep(self) -> int:
        """Tokens before the first question: what a prompt has in common with one that asks something else."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        a, b = (self.template.tokens([*system, {"role": "user", "content": text}]) for text in ("a", "1"))
        return common(a, b)


class _Answer:
    """What the model says, split into thinking and the answer itself, and the ids of the latter."""

    def __init__(self, stream: Stream, prompt: list[int]) -> None:
        self._tokenizer = stream.tokenizer
        end = self._tokenizer.decode(prompt[-8:], skip_special=False, at_start=False)
        self._split = ThinkSplitter(thinking=end.rstrip().endswith(OPEN))
        self._ids: list[int] | None = []
        self._texts: dict[bool, list[str]] = {False: [], True: []}

    def push(self, text: str, token: int | None) -> Iterator[Piece]:
        """token: None with the last piece, which is text that was held back."""
        if token is not None and not text and self._tokenizer.is_skipped(token):
            name = self._tokenizer.token_bytes(token).decode("utf-8", "replace")
            text = name if name in (OPEN, CLOSE) else ""  # where they are control tokens they are no text
        before = self._split.thinking
        yield from self._pieces(self._split.push(text))
        if self._split.thinking:
            self._ids = []
        elif before:  # this token ended the thinking
            self._ids = [] if not self._split.after.strip() else None
        elif self._ids is not None and token is not None:
            self._ids.append(token)

    def flush(self) -> Iterator[Piece]:
        yield from self._pieces(self._split.flush())

    def _pieces(self, split: Iterator[tuple[bool, str]]) -> Iterator[Piece]:
        for thinking, text in split:
            if not thinking and not any(self._texts[False]):
                text = text.lstrip("\n") if self._texts[True] else text
            self._texts[thinking].append(text)
            if text:
                yield Piece(text, thinking)

    def message(self) -> dict[str, Any] | None:
        """The assistant's message; None if there was no answer."""
        content, thinking = "".join(self._texts[False]), "".join(self._texts[True])
        if not content.strip():
            return None
        made: dict[str, Any] = {"role": "assistant", "content": content.strip() if thinking else content}
        ids = self._ids
        if thinking:
            made["reasoning_content"] = thinking.strip()
            while ids and not self._tokenizer.decode(ids[:1], at_start=False).strip():
                ids = ids[1:]
        if ids:
            made["tokens"] = ids
        return made


class ThinkSplitter:
    """push(text) -> (thinking, text) …: what is between <think> and </think> at the beginning of an answer.

    The tags themselves are left out; what may be the beginning of one is held back.
    """

    def __init__(self, thinking: bool = False) -> None:
        """thinking: the prompt has opened it already."""
        self.thinking = thinking
        self.after = ""  # what came behind </think> in one piece with it
        self._begun = thinking
        self._held = ""

    def push(self, text: str) -> Iterator[tuple[bool, str]]:
        text, self._held = self._held + text, ""
        if not self._begun:
            start = text.lstrip()
            if OPEN.startswith(start) and start != OPEN:  # nothing but space counts as a beginning, too
                self._held = text
                return
            self._begun = True
            if start.startswith(OPEN):
                self.thinking, text = True, start[len(OPEN) :]
        if self.thinking:
            inside, tag, self.after = text.partition(CLOSE)
            if not tag:
                n = next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)
                inside, self._held = text[: len(text) - n], text[len(text) - n :]
                yield True, inside
                return
            self.thinking = False
            yield True, inside
            text = self.after
        yield False, text

    def flush(self) -> Iterator[tuple[bool, str]]:
        text, self._held = self._held, ""
        yield self.thinking, text
