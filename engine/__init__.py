"""konly: run language models with multi-head latent attention from GGUF files, from one K-cache.

    from engine import Engine
    for piece in Engine("model.gguf").generate("Once upon a time", max_tokens=64): print(piece, end="")

Names are loaded when first used, so `import engine` costs nothing: neither NumPy nor the kernels come with it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine as Engine
    from .errors import BackendError as BackendError
    from .errors import Cancelled as Cancelled
    from .errors import ContextFullError as ContextFullError
    from .errors import EngineError as EngineError
    from .errors import GrammarError as GrammarError
    from .errors import ModelFormatError as ModelFormatError
    from .errors import SessionError as SessionError
    from .errors import UnsupportedModelError as UnsupportedModelError
    from .grammar import Grammar as Grammar
    from .k_cache import KCacheLayout as KCacheLayout
    from .sampling import Sampling as Sampling
    from .stream import Stream as Stream

_ERRORS = (
    "EngineError",
    "ModelFormatError",
    "UnsupportedModelError",
    "ContextFullError",
    "BackendError",
    "SessionError",
    "GrammarError",
    "Cancelled",
)
_HOME = {
    "Engine": "engine",
    "Stream": "stream",
    "Sampling": "sampling",
    "Grammar": "grammar",
    "KCacheLayout": "k_cache",
    **dict.fromkeys(_ERRORS, "errors"),
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
