"""Llama: a model with one cache of its own, by llama-cpp-python's names."""

from __future__ import annotations

import random
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..chat import BUILTIN, ChatTemplate
from ..engine import Engine
from ..errors import BackendError, EngineError
from ..prefixes import common
from ..sampling import Sampler
from ..stream import Stream
from . import chat, completion
from .grammar import grammar_of
from .options import LLAMA_DEFAULT_SEED, LlamaError, backend_of, check, check_rope, type_k_of


@dataclass(frozen=True)
class LlamaState:
    """What save_state gives: a copy of the cache, in memory. engine.session writes caches to disk."""

    input_ids: np.ndarray  # (n_tokens,) int32
    n_tokens: int
    first_position: int
    rows: list[np.ndarray]  # of each layer (n_tokens, row_stride) u8
    type_k: str
    model: bytes  # its digest
    logits: np.ndarray | None  # (n_vocab,) after the last token, if eval() was the last to add one
    llama_state_size: int  # bytes


class Llama:
    """llama-cpp-python's Llama. The arguments not listed are in options.py.

    n_gpu_layers 0: the CPU; -1 or any other number: all layers on a card, LlamaError if there is none or they don't fit
    n_ctx        0: the model's own
    n_ubatch     tokens of a prompt that are computed together; n_batch only has a name
    seed         of the seeds of the calls that give none; LLAMA_DEFAULT_SEED or a negative one: others each time
    type_k       GGML_TYPE_F16 | GGML_TYPE_BF16 | GGML_TYPE_Q8_0, or konly's name; None: f16
    logits_all   keep the logits of all tokens that eval() gets, in `scores`
    chat_format  None: the file's template; or the name of one in engine/chat.py
    draft_model  anything: konly then guesses by n-grams itself; the text stays the same
    verbose      say on stderr when kernels are compiled, at first use
    """

    def __init__(
        self,
        model_path: str,
        *,
        n_gpu_layers: int | None = 0,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        seed: int = LLAMA_DEFAULT_SEED,
        type_k: int | str | None = None,
        type_v: int | str | None = None,
        last_n_tokens_size: int = 64,
        logits_all: bool = False,
        chat_format: str | None = None,
        chat_handler: Callable[..., Any] | None = None,
        draft_model: Any = None,
        verbose: bool = True,
        **others: Any,
    ) -> None:
        check(others)
        with as_llama_error():
            self.engine = Engine(
                model_path,
                type_k=type_k_of(type_k, type_v),
                n_threads=n_threads,
                n_ubatch=n_ubatch,
                backend=backend_of(n_gpu_layers),
                progress=_announce(verbose),
            )
            hp = self.engine.hparams
            check_rope(others, hp)
            self._stream = self.engine.stream(n_ctx or hp.n_ctx_train)
            self._template = _template(self.engine, chat_format)
        self.model_path, self.verbose, self.last_n_tokens_size = model_path, verbose, last_n_tokens_size
        self.n_batch, self.n_threads = min(n_batch, self.n_ctx()), self._stream.n_threads
        self.chat_format, self.chat_handler = chat_format or "chat_template.default", chat_handler
        self.speculate = draft_model is not None
        self.context_params = SimpleNamespace(n_ctx=self.n_ctx(), n_batch=self.n_batch, n_ubatch=n_ubatch)
        self.metadata = {key: _as_text(value) for key, value in self.engine.model.file.metadata.items()}
        self.scores = np.zeros((self.n_ctx() if logits_all else 1, self.n_vocab()), np.float32)
        self._logits_all = logits_all
        self._logits: np.ndarray | None = None
        self._busy = threading.Lock()  # whoever generates on self._stream holds it
        self.set_seed(seed)

    def close(self) -> None:
        """Give the caches back."""
        self._stream.close()
        self.engine.close()

    # ----------------------------------------------------------------------------------------------------- the text

    def create_completion(self, prompt: str | Sequence[int], *arguments: Any, **keywords: Any) -> Any:
        """Continue a prompt; OpenAI's object, or with stream=True an iterator of its chunks.

        Arguments are completion.Options, in its order. Control tokens that the prompt spells become control tokens, as
        in llama-cpp-python: for chats with strangers, take create_chat_completion. LlamaError if the prompt does not
        fit n_ctx.
        """
        options = completion.Options(*arguments, **keywords)
        with as_llama_error():
            return completion.create(self, prompt, options)

    __call__ = create_completion

    def create_chat_completion(self, messages: list[dict[str, Any]], *arguments: Any, **keywords: Any) -> Any:
        """Answer messages; OpenAI's object, or with stream=True an iterator of its chunks. See chat.ChatOptions."""
        if self.chat_handler is not None:
            return self.chat_handler(llama=self, messages=messages, **chat.named(arguments, keywords))
        options = chat.ChatOptions(*arguments, **keywords)
        with as_llama_error():
            return chat.create(self, messages, options)

    def generate(
        self,
        tokens: Sequence[int],
        *,
        temp: float = 0.8,
        reset: bool = True,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        grammar: Any = None,
        **sampling: Any,
    ) -> Generator[int, Sequence[int] | None, None]:
        """Token ids that continue the tokens, without end; what is sent into it is appended after the token.

        reset   True: instead of what the cache holds, whose shared first tokens are not computed again; False: after it
        """
        with as_llama_error():
            options = completion.Options(temperature=temp, logits_processor=logits_processor, **sampling)
            sampler = self._sampler(options, grammar)
            tokens = [int(token) for token in tokens]
            if reset and not tokens:
                raise LlamaError("generate: there are no tokens to start from")
            if reset:
                n = common(self._stream.tokens, tokens[:-1])
                self._stream.truncate(n)
                tokens = tokens[n:]
            while True:
                self.eval(tokens)
                token = self._choose(sampler)
                if stopping_criteria is not None and stopping_criteria(self._input_ids, self._last_logits()):
                    return
                sent = yield token
                tokens = [token, *(sent or ())]

    def sample(self, *, temp: float = 0.8, logits_processor: Any = None, grammar: Any = None, **sampling: Any) -> int:
        """A token to follow what eval() was given."""
        with as_llama_error():
            options = completion.Options(temperature=temp, logits_processor=logits_processor, **sampling)
            return self._choose(self._sampler(options, grammar))

    def _sampler(self, options: completion.Options, grammar: Any) -> Sampler:
        n_vocab, tokenizer = completion.n_text(self), self.engine.tokenizer
        own = grammar_of(grammar)
        constraint = own.constraint(tokenizer, n_vocab) if own is not None else None
        processors = completion.processors(options.logits_processor)
        return Sampler(
            completion.sampling(self, options),
            n_vocab,
            tokenizer=tokenizer,
            processors=processors,
            constraint=constraint,
        )

    def _choose(self, sampler: Sampler) -> int:
        return sampler.sample(self._last_logits()[: completion.n_text(self)].copy(), self._stream.tokens)

    def _last_logits(self) -> np.ndarray:
        if self._logits is None:
            raise LlamaError("there are no logits to sample from; call eval() first")
        return self._logits

    # ------------------------------------------------------------------------------------------------------- tokens

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Ids of UTF-8; special: control tokens that it spells become control tokens."""
        if not isinstance(text, bytes | bytearray):
            raise TypeError(f"tokenize: text is of type {type(text).__name__}; expected bytes")
        return self.engine.tokenize(text.decode("utf-8", "replace"), add_special=add_bos, parse_special=special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """Bytes of ids. special: control tokens by their names, else left out. prev_tokens: what comes before them."""
        tokenizer = self.engine.tokenizer
        raw = b"".join(tokenizer.token_bytes(int(i)) for i in tokens if special or not tokenizer.is_skipped(int(i)))
        at_start = prev_tokens is None and len(tokens) > 0 and tokens[0] == tokenizer.bos_id
        return raw.removeprefix(b" ") if at_start else raw

    def tokenizer(self) -> Llama:
        """What has tokenize and detokenize."""
        return self

    def token_eos(self) -> int:
        """-1: the model has none, here and below."""
        return _id(self.engine.tokenizer.eos_id)

    def token_bos(self) -> int:
        return _id(self.engine.tokenizer.bos_id)

    def token_nl(self) -> int:
        ids = self.engine.tokenizer.encode("\n", add_special=False)
        return _id(ids[-1] if ids else None)

    def n_ctx(self) -> int:
        return self._stream.n_ctx

    def n_vocab(self) -> int:
        return self.engine.hparams.n_vocab

    def n_embd(self) -> int:
        return self.engine.hparams.n_embd

    # -------------------------------------------------------------------------------------------------------- state

    def eval(self, tokens: Sequence[int]) -> None:
        """Append tokens to the cache."""
        if not len(tokens):
            return
        with as_llama_error():
            n_past = self.n_tokens
            self._check_fits(n_past + len(tokens))
            logits = self._stream.step(tokens, "all" if self._logits_all else "last")
            rows = logits if self._logits_all else logits[None]
            first = n_past if self._logits_all else 0
            self.scores[first : first + len(rows)] = rows
            self._logits = rows[-1]

    def reset(self) -> None:
        """Empty the cache."""
        self.n_tokens = 0

    @property
    def n_tokens(self) -> int:
        """Tokens in the cache; may be set to fewer."""
        return self._stream.n_kv

    @n_tokens.setter
    def n_tokens(self, n: int) -> None:
        with as_llama_error():
            self._stream.truncate(n)
        self._logits = None

    @property
    def input_ids(self) -> np.ndarray:
        """(n_ctx,) int32: the tokens in the cache, zeros after them. A copy."""
        ids = np.zeros(self.n_ctx(), np.intc)
        ids[: self.n_tokens] = self._stream.tokens
        return ids

    @property
    def _input_ids(self) -> np.ndarray:
        return self.input_ids[: self.n_tokens]

    @property
    def eval_tokens(self) -> deque[int]:
        return deque(self._stream.tokens, maxlen=self.n_ctx())

    @property
    def eval_logits(self) -> deque[list[float]]:
        """Of all tokens with logits_all, else of the last."""
        rows = self.scores[: self.n_tokens] if self._logits_all else self.scores[: self._logits is not None]
        return deque(rows.tolist(), maxlen=self.n_ctx() if self._logits_all else 1)

    def set_seed(self, seed: int) -> None:
        """Of the seeds of the calls from now on that give none."""
        fixed = 0 <= seed < LLAMA_DEFAULT_SEED
        self._seeds = random.Random(seed) if fixed else random.Random()

    def set_cache(self, cache: Any) -> None:
        """Does nothing: konly keeps the prefixes of prompts by itself."""

    def save_state(self) -> LlamaState:
        """A copy of the cache."""
        stream, n = self._stream, self._stream.n_kv
        rows = stream.cache.copy(n)
        ids = np.array(stream.tokens, np.int32)
        logits = None if self._logits is None else self._logits.copy()
        size = ids.nbytes + sum(layer.nbytes for layer in rows)
        return LlamaState(
            ids, n, stream.first_position, rows, stream.type_k, stream.model.digest, logits, size
        )  # fmt: skip

    def load_state(self, state: LlamaState) -> None:
        """The cache as it was when the state was saved, by this Llama or another one of the same file."""
        stream = self._stream
        if not isinstance(state, LlamaState):
            raise LlamaError(f"state is of type {type(state).__name__}; expected what save_state() gave")
        if state.model != stream.model.digest or state.type_k != stream.type_k:
            raise LlamaError(
                f"the state is of another model, or of another type_k ({state.type_k}, here {stream.type_k})"
            )
        self._check_fits(state.n_tokens)
        with as_llama_error(), stream._alone():
            stream._restore(state.input_ids.tolist(), state.first_position, state.rows)
        self._logits = state.logits

    def _check_fits(self, n: int) -> None:
        if n > self.n_ctx():
            raise LlamaError(f"Requested tokens ({n}) exceed context window of {self.n_ctx()}")

    @contextmanager
    def _a_stream(self) -> Iterator[Stream]:
        """The stream, or if somebody generates on it at this time, one that lasts as long as the block."""
        if self._busy.acquire(blocking=False):
            try:
                yield self._stream
            finally:
                self._logits = None
                self._busy.release()
        else:
            stream = self.engine.stream(self.n_ctx())
            try:
                yield stream
            finally:
                stream.close()


@contextmanager
def as_llama_error() -> Iterator[None]:
    """Errors of the engine as ValueErrors, which callers of llama-cpp-python expect."""
    try:
        yield
    except LlamaError:
        raise
    except BackendError as error:
        raise LlamaError(f"{error} (n_gpu_layers=0)") from error
    except EngineError as error:
        raise LlamaError(str(error)) from error


def _template(engine: Engine, chat_format: str | None) -> ChatTemplate | None:
    if chat_format in (None, "chat_template.default"):
        return engine.model.template
    if chat_format in BUILTIN:
        return ChatTemplate(BUILTIN[chat_format], engine.tokenizer)
    known = ", ".join(map(repr, BUILTIN))
    raise LlamaError(f"chat_format {chat_format!r} is not known; leave it out for the file's template, or take {known}")


def _announce(verbose: bool) -> Callable[[int, int, str], None] | None:
    said: list[bool] = []

    def progress(done: int, total: int, name: str) -> None:
        if not said:
            said.append(True)
            print("konly: compiling kernels for this processor, once", file=sys.stderr)

    return progress if verbose else None


def _as_text(value: Any) -> str:
    """Metadata as llama.cpp's API gives it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | np.ndarray):
        return f"[{len(value):,} values]"
    return str(value)


def _id(token: int | None) -> int:
    return -1 if token is None else token
