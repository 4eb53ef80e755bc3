"""Model: what the streams of one file share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING

from .gguf_file import GGUFFile
from .hparams import HParams
from .models.deepseek2 import DeepSeek2
from .prefixes import Prefixes
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .chat import ChatTemplate

# Query tokens of a step from which K and V are expanded (MHA mode) instead of absorbed. By operations the two are
# equal at 85 (MiniCPM3), 171 (DeepSeek) and 398 (GLM-4.7-Flash) tokens; expanded panels run nearer to the peak.
MIN_MHA_TOKENS = 64

Progress = Callable[[int, int, str], None]  # of compiling: kernels done, in all, name


@dataclass(frozen=True)
class Model:
    """Read-only, but for the prefixes, which have a lock of their own."""

    file: GGUFFile
    weights: DeepSeek2
    hparams: HParams
    tokenizer: Tokenizer
    ops: ModuleType
    arrays: ModuleType
    prefixes: Prefixes
    n_threads: int | None
    n_ubatch: int
    min_mha_tokens: int
    progress: Progress | None

    @cached_property
    def digest(self) -> bytes:
        """32 bytes that tell this model from others."""
        from .session import digest

        return digest(self.file)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The file's chat template."""
        from .chat import ChatTemplate

        return ChatTemplate.from_metadata(self.file.metadata, self.tokenizer)
