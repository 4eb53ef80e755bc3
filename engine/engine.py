"""Engine: opens a model file. It is its own first stream; `stream()` gives others over the same weights."""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from importlib.resources import as_file, files
from typing import TYPE_CHECKING, Unpack

from . import models, placing
from .backend import cpu
from .errors import EngineError
from .gguf_file import read
from .hparams import HParams
from .k_cache import DEFAULT_TYPE_K
from .model import MIN_MHA_TOKENS, Model, Progress
from .placing import Shape
from .prefixes import Prefixes
from .request import Arguments
from .stream import Stream
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .batch import Batch

DEFAULT_MODEL = "tiny-mla-tales-Q8_0.gguf"
DEFAULT_N_CTX = 4096
MAX_N_CTX = 1 << 24
DEFAULT_PREFIX_BYTES = 512 << 20


class Engine(Stream):
    """A model and its default stream.

    path       a GGUF file, of a split model the first part; None: the small story model that comes with konly
    n_ctx      tokens that the cache holds; None: the smaller of the model's own and 4,096. Memory is taken as it fills
    type_k     'f16' | 'bf16' | 'q8': how the cache keeps its rows
    n_threads  None: one for each physical core
    n_ubatch   tokens of a prompt that are computed together; None: 512 on the CPU, 2,048 on a card
    min_mha_tokens   steps of so many tokens expand K and V from the cache (MHA mode), shorter ones absorb (MQA mode)
    prefix_bytes     memory for prompts that streams come back to (prefixes.py); 0: none
    backend    'cpu' | 'gpu' | 'auto': the card if there is one that the model fits, with or without its experts
    experts    'gpu' | 'cpu': where routed experts are computed; None: on the backend, or with 'auto' where they fit
    progress   called as progress(done, total, name) while kernels are compiled: at first use on this machine
    loading    called as loading(bytes, of all, name) while weights go to a card

    ModelFormatError for a damaged file, UnsupportedModelError for a sound one that konly does not run, BackendError
    if there is no card that can be used, or too little of its memory free: before anything is brought there.
    """

    backend: str  # where it runs: 'cpu', 'gpu', or 'gpu, experts on the CPU'

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        n_ctx: int | None = None,
        type_k: str = DEFAULT_TYPE_K,
        n_threads: int | None = None,
        n_ubatch: int | None = None,
        min_mha_tokens: int = MIN_MHA_TOKENS,
        prefix_bytes: int = DEFAULT_PREFIX_BYTES,
        backend: str = "cpu",
        experts: str | None = None,
        progress: Progress | None = None,
        loading: Progress | None = None,
    ):
        n_ctx = None if n_ctx is None else _count("n_ctx", n_ctx, MAX_N_CTX)
        n_threads = None if n_threads is None else _count("n_threads", n_threads)
        n_ubatch = None if n_ubatch is None else _count("n_ubatch", n_ubatch)
        min_mha_tokens = _count("min_mha_tokens", min_mha_tokens)
        prefix_bytes = _count("prefix_bytes", prefix_bytes, low=0)
        self.path = os.fsdecode(path if path is not None else default_model())
        file = read(self.path)
        hparams = HParams.from_gguf(file)
        n_ctx = n_ctx or min(hparams.n_ctx_train, DEFAULT_N_CTX)
        tokenizer = Tokenizer.from_gguf(file)
        weights = models.build(hparams, file, cpu().ops)
        shape = Shape(n_ctx, type_k, n_ubatch, min_mha_tokens)
        chosen, weights = placing.choose(weights, backend, experts, shape, loading)
        self.backend = chosen.name
        model = Model(
            file,
            weights,
            hparams,
            tokenizer,
            chosen.ops,
            chosen.arrays,
            Prefixes(prefix_bytes),
            n_threads,
            n_ubatch or chosen.n_ubatch,
            min_mha_tokens,
            progress,
        )
        self._batches: list[Batch] = []  # that run
        super().__init__(model, n_ctx, type_k)

    def stream(self, n_ctx: int | None = None, type_k: str | None = None) -> Stream:
        """Another cache and position over the same weights; may run in another thread."""
        n_ctx = self.n_ctx if n_ctx is None else _count("n_ctx", n_ctx, MAX_N_CTX)
        return Stream(self.model, n_ctx, self.type_k if type_k is None else type_k)

    def cancel(self) -> None:
        """Stop what runs in other threads, of the default stream or generate_many(), at the next tile."""
        super().cancel()
        for batch in list(self._batches):
            batch.cancel()

    def close(self) -> None:
        """As Stream.close(); the prefixes are given back, too. Streams of this engine go on."""
        super().close()
        self.model.prefixes.clear()

    def generate_many(
        self,
        prompts: Sequence[str | Sequence[int]],
        max_tokens: int | None = None,
        n_parallel: int = 8,
        **arguments: Unpack[Arguments],
    ) -> list[str]:
        """The texts that continue several prompts, computed side by side: one pass over the weights serves them all.

        n_parallel   how many at once, 1 to 16, each with a cache of its own
        Other arguments as generate(), for every prompt alike. Each text is what its stream would give alone.
        Cancelled after cancel(): nothing is returned.
        """
        from .batch import generate_many

        return generate_many(self, prompts, n_parallel, {"max_tokens": max_tokens, **arguments})


def _count(name: str, value: object, high: int | None = None, low: int = 1) -> int:
    """The value as an int; any integer will do, a bool will not."""
    try:
        n = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        n = -1
    if n < low or isinstance(value, bool) or (high is not None and n > high):
        at_least = "a positive integer" if low == 1 else f"an integer, {low} or more"
        expected = at_least if high is None else f"an integer from {low} to {high:,}"
        raise EngineError(f"{name} is {value!r}; expected {expected}")
    return n


def default_model() -> str:
    """Path of the model that comes with the package."""
    with as_file(files(__package__) / "data" / DEFAULT_MODEL) as path:
        return str(path)
