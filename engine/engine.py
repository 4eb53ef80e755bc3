"""Engine: opens a model file. It is its own first stream; `stream()` gives others over the same weights."""

from __future__ import annotations

import os
from importlib.resources import as_file, files

from . import backend as backends
from . import models
from .errors import EngineError
from .gguf_file import read
from .hparams import HParams
from .stream import Model, Progress, Stream
from .tokenizer import Tokenizer

DEFAULT_MODEL = "tiny-mla-tales-Q8_0.gguf"
DEFAULT_N_CTX = 4096


class Engine(Stream):
    """A model and its default stream.

    path       a GGUF file, of a split model the first part; None: the small story model that comes with konly
    n_ctx      tokens that the cache holds; None: the smaller of the model's own and 4,096. Memory is taken as it fills
    type_k     'f16' | 'bf16' | 'q8': how the cache keeps its rows
    n_threads  None: one for each physical core
    n_ubatch   tokens of a prompt that are computed together
    backend    'cpu' | 'gpu' | 'auto'
    progress   called as progress(done, total, name) while kernels are compiled: at first use on this machine

    ModelFormatError for a damaged file, UnsupportedModelError for a sound one that konly does not run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        n_ctx: int | None = None,
        type_k: str = "f16",
        n_threads: int | None = None,
        n_ubatch: int = 512,
        backend: str = "cpu",
        progress: Progress | None = None,
    ):
        for name, value in (("n_ctx", n_ctx), ("n_threads", n_threads), ("n_ubatch", n_ubatch)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise EngineError(f"{name} is {value!r}; expected a positive integer")
        ops = backends.ops(backend)
        self.path = os.fspath(path if path is not None else default_model())
        file = read(self.path)
        hparams = HParams.from_gguf(file)
        weights = models.build(hparams, file, ops)
        model = Model(weights, hparams, Tokenizer.from_gguf(file), ops, n_threads, n_ubatch, progress)
        super().__init__(model, n_ctx or min(hparams.n_ctx_train, DEFAULT_N_CTX), type_k)

    def stream(self, n_ctx: int | None = None, type_k: str | None = None) -> Stream:
        """Another cache and position over the same weights; may run in another thread."""
        return Stream(self.model, n_ctx or self.n_ctx, type_k or self.type_k)


def default_model() -> str:
    """Path of the model that comes with the package."""
    with as_file(files(__package__) / "data" / DEFAULT_MODEL) as path:
        return str(path)
