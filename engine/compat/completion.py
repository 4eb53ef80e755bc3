"""create_completion: a prompt and OpenAI's arguments in, OpenAI's object or its chunks out.

    Options ─► Request (ids, checked) ─► stream_generate ─► pieces ─► one object, or a chunk for each piece

Everything that can be wrong with the arguments is found before the first chunk is asked for.
"""

from __future__ import annotations

import codecs
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..grammar import Grammar
from ..sampling import Sampling, TokenLogprobs, token_logprobs
from ..stream import Stream
from .grammar import grammar_of
from .options import LLAMA_DEFAULT_SEED, LlamaError

if TYPE_CHECKING:
    from .llama import Llama

Logprobs = dict[str, list[Any]]


@dataclass(frozen=True)
class Options:
    """Arguments of create_completion after the prompt, in llama-cpp-python's order. None: the default.

    suffix        text to put after the answer
    max_tokens    None, 0 or less: until n_ctx is full
    temperature   0: greedy; less: the model's own distribution, uncut
    logprobs      how many alternatives each token shows
    echo          begin with the prompt; with logprobs, of its tokens too
    tfs_z, penalize_nl   have no effect, as in llama.cpp
    """

    suffix: str | None = None
    max_tokens: int | None = 16
    temperature: float | None = 0.8
    top_p: float | None = 0.95
    min_p: float | None = 0.05
    typical_p: float | None = 1.0
    logprobs: int | None = None
    echo: bool | None = False
    stop: str | Sequence[str] | None = ()
    frequency_penalty: float | None = 0.0
    presence_penalty: float | None = 0.0
    repeat_penalty: float | None = 1.0
    top_k: int | None = 40
    stream: bool | None = False
    seed: int | None = None
    tfs_z: float | None = 1.0
    mirostat_mode: int | None = 0
    mirostat_tau: float | None = 5.0
    mirostat_eta: float | None = 0.1
    model: str | None = None
    stopping_criteria: Callable[[Any, Any], bool] | None = None
    logits_processor: Any = None
    grammar: Any = None
    logit_bias: Mapping[Any, float] | None = None
    penalize_nl: bool | None = True


@dataclass(frozen=True)
class Request:
    """A completion to be made."""

    llama: Llama
    ids: list[int]
    prompt: str  # what echo shows
    max_tokens: int
    stops: list[str]
    sampling: Sampling
    grammar: Grammar | None
    options: Options
    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4()}")
    created: int = field(default_factory=lambda: int(time.time()))

    def choice(self, text: str, logprobs: Logprobs | None, finish_reason: str | None) -> dict[str, Any]:
        """An object or a chunk with this text."""
        choices = [{"text": text, "index": 0, "logprobs": logprobs, "finish_reason": finish_reason}]
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model}
        return head | {"choices": choices}


@dataclass(frozen=True, slots=True)
class Shown:
    """A token of the answer, or with echo of the prompt."""

    token: int
    offset: int  # where its text begins, in characters of the answer; negative in the prompt
    logprobs: TokenLogprobs | None  # None: the first token of a prompt, which nothing precedes


@dataclass
class Piece:
    """Some text, with the tokens that it comes from if logprobs are wanted."""

    text: str
    tokens: list[Shown]
    finish_reason: str | None = None
    n_generated: int = 0


def create(llama: Llama, prompt: str | Sequence[int], options: Options) -> dict[str, Any] | Iterator[dict[str, Any]]:
    """OpenAI's object, or its chunks if options.stream."""
    request = requested(llama, prompt, options)
    return _chunks(request) if options.stream else _whole(request)


def requested(llama: Llama, prompt: str | Sequence[int], options: Options) -> Request:
    """The request, checked. LlamaError if the prompt leaves no room."""
    tokenizer = llama.engine.tokenizer
    if isinstance(prompt, str):
        ids, text = tokenizer.encode(prompt, parse_special=True), prompt
        if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_id:
            del ids[0]  # the prompt begins with the BOS token's name
    else:
        ids = [int(token) for token in prompt]
        text = tokenizer.decode(ids)
    if not ids:
        raise LlamaError("the prompt is empty, and the model has no BOS token to start from")
    n_ctx = llama.n_ctx()
    if len(ids) >= n_ctx:
        raise LlamaError(f"Requested tokens ({len(ids)}) exceed context window of {n_ctx}")
    room = n_ctx - len(ids)
    wanted = options.max_tokens
    stop = [options.stop] if isinstance(options.stop, str) else list(options.stop or ())
    return Request(
        llama=llama,
        ids=ids,
        prompt=text,
        max_tokens=room if wanted is None or wanted <= 0 else min(wanted, room),
        stops=[s for s in stop if s],
        sampling=sampling(llama, options),
        grammar=grammar_of(options.grammar),
        options=options,
        model=options.model or llama.model_path,
    )


def sampling(llama: Llama, options: Options) -> Sampling:
    """konly's Sampling. A call without a seed gets one from the Llama's."""
    given = {
        name: value
        for name in (
            "temperature", "top_p", "min_p", "typical_p", "frequency_penalty", "presence_penalty", "repeat_penalty",
            "top_k", "mirostat_tau", "mirostat_eta",
        )
        if (value := getattr(options, name)) is not None
    }  # fmt: skip
    if given.get("temperature", 0.0) < 0:
        given |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    if "top_k" in given:
        given["top_k"] = max(0, given["top_k"])
    if options.tfs_z not in (None, 1.0):
        warnings.warn("tfs_z has no effect; llama.cpp dropped tail-free sampling, too", stacklevel=2)
    seed = llama._seeds.randrange(LLAMA_DEFAULT_SEED) if options.seed is None else options.seed
    return Sampling(
        **given,
        mirostat=options.mirostat_mode or 0,
        repeat_last_n=max(-1, llama.last_n_tokens_size),
        logit_bias=_biases(options.logit_bias),
        seed=None if seed < 0 or seed == LLAMA_DEFAULT_SEED else seed,
    )


def processors(given: Any) -> list[Callable[..., Any]]:
    """llama-cpp-python's logits processors, which get an array of ids, as konly's."""
    if given is None:
        return []
    each = list(given) if isinstance(given, Sequence) else [given]
    return [lambda history, logits, p=p: p(np.array(history, np.intc), logits) for p in each]


def n_text(llama: Llama) -> int:
    """How many logits belong to tokens: some files have more."""
    return min(llama.n_vocab(), llama.engine.tokenizer.n_vocab)


def _biases(given: Mapping[Any, float] | None) -> dict[int, float] | None:
    """OpenAI's clients send ids as text."""
    try:
        return {int(token): float(bias) for token, bias in given.items()} if given else None
    except (TypeError, ValueError, AttributeError):
        raise LlamaError(f"logit_bias is {given!r}; expected token ids with numbers") from None


def _whole(request: Request) -> dict[str, Any]:
    parts = list(_pieces(request))
    logprobs = _join([_logprobs(request, part) for part in parts])
    text = "".join(part.text for part in parts)
    n_prompt, n_generated = len(request.ids), parts[-1].n_generated
    usage = {"prompt_tokens": n_prompt, "completion_tokens": n_generated, "total_tokens": n_prompt + n_generated}
    return request.choice(text, logprobs, parts[-1].finish_reason) | {"usage": usage}


def _chunks(request: Request) -> Iterator[dict[str, Any]]:
    for piece in _pieces(request):
        if piece.text or piece.tokens:
            yield request.choice(piece.text, _logprobs(request, piece), None)
        if piece.finish_reason is not None:
            yield request.choice("", None, piece.finish_reason)


def _pieces(request: Request) -> Iterator[Piece]:
    """The prompt, if it is to be echoed, the answer in pieces, and a last one with the suffix and the finish_reason."""
    from .llama import as_llama_error

    with as_llama_error(), request.llama._a_stream() as stream:
        if request.options.echo:
            yield _prompt_piece(request, stream)
        yield from _answer(request, stream)


def _answer(request: Request, stream: Stream) -> Iterator[Piece]:
    llama, options = request.llama, request.options
    criteria = Criteria(options.stopping_criteria)
    responses = stream.stream_generate(
        request.ids,
        max_tokens=request.max_tokens,
        stop=request.stops,
        sampling=request.sampling,
        logits_processor=[*criteria.processors, *processors(options.logits_processor)],
        grammar=request.grammar,
        logprobs=options.logprobs,
        speculate=llama.speculate and not criteria.processors,
    )
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    ids: list[int] = []
    waiting: list[Shown] = []  # tokens whose text has not been shown yet
    n_shown = n_read = 0  # characters
    try:
        for response in responses:
            text, finish_reason = response.text, response.finish_reason
            if finish_reason is None and criteria.met:
                text, finish_reason = llama.engine.tokenizer.decode(ids, at_start=False)[n_shown:], "stop"
            elif finish_reason is None:
                ids.append(response.token)
                if options.logprobs is not None:
                    waiting.append(Shown(response.token, n_read, response.logprobs))
                n_read += len(decoder.decode(llama.detokenize([response.token], [])))
            n_shown += len(text)
            ready = [shown for shown in waiting if shown.offset < n_shown]  # what a stop string took has no tokens
            if finish_reason is not None:
                yield Piece(text + (options.suffix or ""), ready, finish_reason, len(ids))
                return
            if text:
                yield Piece(text, ready)
                del waiting[: len(ready)]
    finally:
        responses.close()


class Criteria:
    """llama-cpp-python's stopping criteria: called before each token is chosen; that token is then dropped."""

    def __init__(self, given: Callable[[Any, Any], bool] | None) -> None:
        self.met = False
        self._given = given
        self.processors = [self._look] if given is not None else []

    def _look(self, history: Sequence[int], logits: np.ndarray) -> None:
        assert self._given is not None
        self.met = self.met or bool(self._given(np.array(history, np.intc), logits.copy()))


# ------------------------------------------------------------------------------------------------------- logprobs


def _logprobs(request: Request, piece: Piece) -> Logprobs | None:
    """OpenAI's, of completions: lists with an entry for each token. Its text is '' for a part of a character."""
    if request.options.logprobs is None:
        return None
    llama, start = request.llama, len(request.prompt)

    def text(token: int) -> str:
        return llama.detokenize([token], []).decode("utf-8", "ignore")

    def top(shown: Shown) -> dict[str, float] | None:
        if shown.logprobs is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in shown.logprobs.top:
            found.setdefault(text(token), logprob)
        return found | {text(shown.token): shown.logprobs.logprob}

    return {
        "tokens": [text(shown.token) for shown in piece.tokens],
        "text_offset": [start + shown.offset for shown in piece.tokens],
        "token_logprobs": [shown.logprobs and shown.logprobs.logprob for shown in piece.tokens],
        "top_logprobs": [top(shown) for shown in piece.tokens],
    }


def _join(parts: list[Logprobs | None]) -> Logprobs | None:
    known = [part for part in parts if part is not None]
    return {name: [value for part in known for value in part[name]] for name in known[0]} if known else None


def _prompt_piece(request: Request, stream: Stream) -> Piece:
    """The prompt; with logprobs its tokens too, for which it is computed anew. The first one that shows has none."""
    wanted = request.options.logprobs
    if wanted is None:
        return Piece(request.prompt, [])
    llama, ids = request.llama, request.ids
    stream.clear()
    found: list[TokenLogprobs] = []
    size = stream.n_ubatch  # rows of n_vocab logits at a time
    for start in range(0, len(ids) - 1, size):
        rows = stream.step(ids[start : min(start + size, len(ids) - 1)], "all")[:, : n_text(llama)]
        found += [token_logprobs(row, token, wanted) for row, token in zip(rows, ids[start + 1 :])]
    first = int(ids[0] == llama.engine.tokenizer.bos_id)
    shown, n_read = [], -len(request.prompt)
    decoder = codecs.getincrementaldecoder("utf-8")("ignore")
    for i in range(first, len(ids)):
        shown.append(Shown(ids[i], n_read, found[i - 1] if i > first else None))
        n_read += len(decoder.decode(llama.detokenize([ids[i]], [])))
    return Piece(request.prompt, shown)
