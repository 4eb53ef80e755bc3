"""A stream that says what it was told to, over a tokenizer of the names which chat templates use."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizer_files import bpe_file, trained_bpe

from engine.errors import SessionError
from engine.generation import Response, Stats
from engine.tokenizer.tokenizer import CONTROL, NORMAL, USER_DEFINED, Tokenizer

NAMES = (  # of control tokens, of all the models whose templates are in tests/data/chat_templates
    *("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<\uff5cUser\uff5c>"),
    *("<\uff5cAssistant\uff5c>", "<\uff5ctool\u2581call\u2581begin\uff5c>", "<\uff5ctool\u2581calls\u2581begin\uff5c>"),
    *("<|im_start|>", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"),
    *("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|tool_call_begin|>"),
)
THINK = ("<think>", "</think>")


def chat_tokenizer(folder: Path, think_type: int = USER_DEFINED) -> Tokenizer:
    """BPE whose merges reach over every seam, and the tokens above; the first name is BOS, the second EOS."""
    tokens, merges = trained_bpe()
    types = [NORMAL] * len(tokens) + [CONTROL] * len(NAMES) + [think_type] * 2
    bos = len(tokens)
    f = bpe_file(folder, [*tokens, *NAMES, *THINK], merges, types, "deepseek-v3", bos_token_id=bos,
                 eos_token_id=bos + 1, add_bos_token=True)  # fmt: skip
    return Tokenizer.from_gguf(f)


class FakeStream:
    """answers: what it says, one after the other; an exception among their pieces is raised there.

    prompts, arguments: what it was given.
    """

    def __init__(self, tokenizer: Tokenizer, answers: Sequence[Any] = (), n_ctx: int = 4096) -> None:
        self.tokenizer, self.n_ctx, self.type_k = tokenizer, n_ctx, "f16"
        self.model = SimpleNamespace(progress=None)
        self.answers = list(answers)
        self.tokens: list[int] = []
        self.prompts: list[list[int]] = []
        self.arguments: dict[str, Any] = {}
        self.shifts: list[tuple[int, int]] = []
        self.stats = Stats()
        self.saved: dict[str, Any] = {}

    @property
    def n_kv(self) -> int:
        return len(self.tokens)

    @property
    def cache_bytes(self) -> int:
        return 1024 * self.n_kv

    def stream_generate(
        self, ids: list[int], progress: Callable[[int, int], None] | None = None, **arguments: Any
    ) -> Generator[Response, None, None]:
        self.prompts.append(ids)
        self.arguments = arguments
        answer = self.answers.pop(0)
        pieces = [answer] if isinstance(answer, str) else answer
        n_reused = next((i for i, (a, b) in enumerate(zip(ids, self.tokens)) if a != b), min(len(ids), self.n_kv))
        self.stats = Stats(n_prompt=len(ids), n_reused=n_reused)
        self.tokens = list(ids)

        def responses() -> Generator[Response, None, None]:
            text = self.tokenizer.stream(at_start=False)
            token = ids[-1]
            for piece in pieces:
                if not isinstance(piece, str):
                    raise piece
                for token in self.tokenizer.encode(piece, add_special=False, parse_special=True):
                    self.stats.n_generated += 1
                    self.stats.t_generated += 0.001
                    self.tokens.append(token)
                    yield self._response(text.push(token), token, None)
            yield self._response(text.flush(), token, "stop")

        return responses()

    def _response(self, text: str, token: int, finish_reason: str | None) -> Response:
        return Response(text, token, None, False, 0, 0.0, self.stats.n_generated, 0.0, 0.0, finish_reason)

    def shift(self, n_keep: int, n_discard: int) -> None:
        self.shifts.append((n_keep, n_discard))
        del self.tokens[n_keep : n_keep + n_discard]

    def clear(self) -> None:
        self.tokens = []

    def save(self, path: Any, extra: dict[str, Any] | None = None) -> None:
        try:
            Path(path).write_text("a session")
        except OSError as error:
            raise SessionError(f"{path}: cannot be written") from error
        self.saved = extra or {}

    def load(self, path: Any) -> dict[str, Any]:
        return self.saved
