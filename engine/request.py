"""Request: what generate() was asked for. Arguments types its keywords, so that an editor and mypy know them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from .errors import EngineError
from .sampling import LogitsProcessor, Sampling

if TYPE_CHECKING:
    from .grammar import Grammar
    from .stream import Stream


class SamplingFields(TypedDict, total=False):
    """Those of Sampling, which says what they mean."""

    logit_bias: Mapping[int, float] | None
    ignore_eos: bool
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    repeat_last_n: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: Sequence[str]
    top_n_sigma: float
    top_k: int
    typical_p: float
    top_p: float
    min_p: float
    xtc_probability: float
    xtc_threshold: float
    min_keep: int
    temperature: float
    dynatemp_range: float
    dynatemp_exponent: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    seed: int | None


class Arguments(SamplingFields, total=False):
    """The other keywords of generate(); Stream.stream_generate says what they mean."""

    stop: str | Sequence[str]
    sampling: Sampling | None
    context_shift: bool
    n_keep: int | None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor]
    grammar: Grammar | None
    logprobs: int | None
    speculate: bool
    progress: Callable[[int, int], None] | None


@dataclass(frozen=True)
class Request:
    """The arguments of stream_generate, checked."""

    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    context_shift: bool = False
    n_keep: int | None = None
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor] = ()
    grammar: Grammar | None = None
    logprobs: int | None = None
    speculate: bool = False
    progress: Callable[[int, int], None] | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "n_keep", "logprobs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0):
                raise EngineError(f"{name} is {value!r}; expected 0 or more, or None")
        if not isinstance(self.sampling, Sampling):
            raise EngineError(f"sampling is of type {type(self.sampling).__name__}; expected a Sampling")
        if not isinstance(self.stop, Sequence):
            raise EngineError(f"stop is {self.stop!r}; expected a text, or a list of them")
        if self.grammar is not None and not hasattr(self.grammar, "constraint"):
            raise EngineError(f"grammar is of type {type(self.grammar).__name__}; expected a Grammar")
        if not callable(self.logits_processor) and not isinstance(self.logits_processor, Sequence):
            raise EngineError(f"logits_processor is {self.logits_processor!r}; expected callables of (history, logits)")
        if self.progress is not None and not callable(self.progress):
            raise EngineError(f"progress is {self.progress!r}; expected a callable of (done, total)")

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Request:
        """Known arguments as they are; the others are fields of a Sampling."""
        known = {f.name for f in fields(cls)}
        own = {name: value for name, value in arguments.items() if name in known and value is not None}
        rest = {name: value for name, value in arguments.items() if name not in known}
        if "sampling" in own and rest:
            raise EngineError(f"give either sampling or {', '.join(rest)}, not both")
        if unknown := set(rest) - set(Sampling.__dataclass_fields__):
            names = ", ".join(Sampling.__dataclass_fields__)
            raise EngineError(f"unknown sampling fields: {', '.join(sorted(unknown))}; known: {names}")
        if rest:
            own["sampling"] = Sampling(**rest)
        return cls(**own)

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


def prompt_ids(stream: Stream, prompt: str | Sequence[int]) -> list[int]:
    """The tokens of a prompt: at least one, all of the vocabulary, and no more than the context holds."""
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes | bytearray):
        raise EngineError(f"prompt is of type {type(prompt).__name__}; expected text or token ids")
    ids = stream.tokenize(prompt) if isinstance(prompt, str) else prompt
    if isinstance(ids, Sequence) and not ids:
        raise EngineError("the prompt is empty, and the model has no BOS token to start from")
    return [int(token) for token in stream._checked(ids, 0)]
