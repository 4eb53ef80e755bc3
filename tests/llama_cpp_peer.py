"""llama.cpp in the Python process: logits and greedy text of a real peer, from the prebuilt wheel `xllamacpp`.

The wheel's extension module exports llama.cpp's C symbols, and ctypes reaches them.  The structures below
are those of exactly PINNED; another version has others, so tests call `require_xllamacpp()` first.

    peer = LlamaCpp(path, n_ctx=512)
    logits = peer.eval(tokens, pos=0)              # (n_tok, n_vocab) f32
"""

from __future__ import annotations

import ctypes as C
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PINNED = "2026.10.11549"
CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}


def require_xllamacpp() -> None:
    """Skip the test, with the reason, where the wheel is not at hand; with CI=true fail it."""
    try:
        found = importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found != PINNED:
        refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        refuse(f"llama.cpp comparison needs xllamacpp=={PINNED}, found {found or 'none'}")


class LlamaCpp:
    """A model and one context of llama.cpp on the CPU.

    type_k      type of its K-cache (and V-cache, where it keeps one)
    flash_attn  True | False | None: as llama.cpp chooses
    record      names of graph nodes, e.g. "ffn_moe_logits": their values in the last `eval`, in `recorded` by
                (il, name), each (n_tok, …) f32.  Short prompts only: a prompt beyond n_ubatch (512) comes in parts
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n_ctx: int = 512,
        threads: int = 2,
        type_k: str = "f16",
        flash_attn: bool | None = None,
        record: Sequence[str] = (),
    ) -> None:
        self._lib = lib = _library()
        self.recorded: dict[tuple[int, str], np.ndarray] = {}
        model_params = lib.llama_model_default_params()
        model_params.n_gpu_layers = 0
        self._model = lib.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self._model:
            raise RuntimeError(f"{path}: llama.cpp does not load it: {''.join(_log[-5:])}")
        params = lib.llama_context_default_params()
        if (params.n_batch, params.n_ubatch, params.type_k) != (2048, 512, CACHE_TYPES["f16"]):
            raise RuntimeError("xllamacpp has other structures than the pinned version")
        params.n_ctx, params.n_threads, params.n_threads_batch = n_ctx, threads, threads
        params.type_k = params.type_v = CACHE_TYPES[type_k]
        params.flash_attn_type = -1 if flash_attn is None else int(flash_attn)
        self._observer = _OBSERVER(self._observe(record))
        if record:
            params.cb_eval = C.cast(self._observer, _P)
        self._ctx = lib.llama_init_from_model(self._model, params)
        if not self._ctx:
            raise RuntimeError(f"{path}: llama.cpp makes no context: {''.join(_log[-5:])}")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab = lib.llama_vocab_n_tokens(self._vocab)

    def eval(self, tokens: Sequence[int] | np.ndarray, pos: int) -> np.ndarray:
        """Logits (n_tok, n_vocab) f32 of tokens at positions pos, pos + 1, …"""
        self._n_tok = n_tok = len(tokens)
        batch = self._lib.llama_batch_init(n_tok, 0, 1)
        batch.n_tokens = n_tok
        for it, token in enumerate(tokens):
            batch.token[it], batch.pos[it], batch.n_seq_id[it], batch.logits[it] = int(token), pos + it, 1, 1
            batch.seq_id[it][0] = 0
        status = self._lib.llama_decode(self._ctx, batch)
        self._lib.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}: {''.join(_log[-5:])}")
        rows = (self._lib.llama_get_logits_ith(self._ctx, it) for it in range(n_tok))
        return np.stack([np.ctypeslib.as_array(row, (self.n_vocab,)).copy() for row in rows])

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        data = text.encode()
        ids = (C.c_int32 * (len(data) + 8))()
        n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, len(ids), add_special, parse_special)
        return list(ids[:n])

    def piece(self, token: int) -> bytes:
        buffer = C.create_string_buffer(256)
        n = self._lib.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[:n]

    def greedy(self, prompt: str, n: int) -> tuple[list[int], str]:
        """The n most likely tokens after the prompt, from an empty cache, and their text; it stops at no token."""
        ids = self.tokenize(prompt)
        self.clear()
        new = [int(self.eval(ids, 0)[-1].argmax())]
        while len(new) < n:
            new.append(int(self.eval(new[-1:], len(ids) + len(new) - 1)[-1].argmax()))
        return new, b"".join(map(self.piece, new)).decode(errors="replace")

    def clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._ctx), True)

    def close(self) -> None:
        self._lib.llama_free(self._ctx)
        self._lib.llama_model_free(self._model)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _observe(self, names: Sequence[str]) -> Callable[[int, bool, int | None], bool]:
        def observe(tensor: int, ask: bool, _: int | None) -> bool:
            """Asked before a node is computed whether its value is wanted; called again when it is there."""
            name, _, il = self._lib.ggml_get_name(tensor).decode().rpartition("-")
            if ask:
                return name in names
            data = np.empty((self._n_tok, self._lib.ggml_nelements(tensor) // self._n_tok), np.float32)
            self._lib.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
            self.recorded[int(il), name] = data
            return True

        return observe


_P, _I, _U, _F, _B = C.c_void_p, C.c_int32, C.c_uint32, C.c_float, C.c_bool
_OBSERVER = C.CFUNCTYPE(_B, _P, _B, _P)
_LOGGER = C.CFUNCTYPE(None, C.c_int, C.c_char_p, _P)


class _ModelParams(C.Structure):
    _fields_ = [
        *((name, _P) for name in ("devices", "tensor_buft_overrides")),
        *((name, _I) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, _P) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        *((name, _B) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")),
    ]


class _ContextParams(C.Structure):
    _fields_ = [
        *((name, _U) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq", "n_outputs_max")),
        ("n_outputs_max_per_seq", _U),
        *((name, _I) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type")),
        *((name, _I) for name in ("attention_type", "flash_attn_type")),
        *((name, _F) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, _F) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", _U),
        ("defrag_thold", _F),
        *((name, _P) for name in ("cb_eval", "cb_eval_data")),
        *((name, _I) for name in ("type_k", "type_v")),
        *((name, _P) for name in ("abort", "abort_data")),
        *((name, _B) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", _P),
        ("n_samplers", C.c_size_t),
        ("ctx_other", _P),
    ]


class _Batch(C.Structure):
    _fields_ = [
        ("n_tokens", _I),
        ("token", C.POINTER(_I)),
        ("embd", _P),
        ("pos", C.POINTER(_I)),
        ("n_seq_id", C.POINTER(_I)),
        ("seq_id", C.POINTER(C.POINTER(_I))),
        ("logits", C.POINTER(C.c_int8)),
    ]


_FUNCTIONS: dict[str, tuple[Any, ...]] = {  # name: result, arguments
    "llama_log_set": (None, _LOGGER, _P),
    "llama_backend_init": (None,),
    "llama_model_default_params": (_ModelParams,),
    "llama_model_load_from_file": (_P, C.c_char_p, _ModelParams),
    "llama_model_get_vocab": (_P, _P),
    "llama_model_free": (None, _P),
    "llama_context_default_params": (_ContextParams,),
    "llama_init_from_model": (_P, _P, _ContextParams),
    "llama_get_memory": (_P, _P),
    "llama_memory_clear": (None, _P, _B),
    "llama_free": (None, _P),
    "llama_vocab_n_tokens": (_I, _P),
    "llama_tokenize": (_I, _P, C.c_char_p, _I, C.POINTER(_I), _I, _B, _B),
    "llama_token_to_piece": (_I, _P, _I, C.c_char_p, _I, _I, _B),
    "llama_batch_init": (_Batch, _I, _I, _I),
    "llama_batch_free": (None, _Batch),
    "llama_decode": (_I, _P, _Batch),
    "llama_get_logits_ith": (C.POINTER(_F), _P, _I),
    "ggml_get_name": (C.c_char_p, _P),
    "ggml_nelements": (C.c_int64, _P),
    "ggml_backend_tensor_get": (None, _P, _P, C.c_size_t, C.c_size_t),
}

_log: list[str] = []
_keep_log = _LOGGER(lambda level, text, _: _log.append(text.decode(errors="replace")))


@functools.cache
def _library() -> C.CDLL:
    """The wheel's extension module with typed functions; its log goes to `_log`, not to the terminal."""
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    lib = C.CDLL(str(next(path for end in ("so", "pyd") for path in folder.glob(f"xllamacpp*.{end}"))))
    for name, (result, *arguments) in _FUNCTIONS.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.llama_log_set(_keep_log, None)
    lib.llama_backend_init()
    return lib


def peer_logits(path: str | os.PathLike[str], tokens: np.ndarray, type_k: str = "f16") -> np.ndarray:
    """Logits (n_tok, n_vocab) f32 of tokens from an empty cache, in one batch."""
    with LlamaCpp(path, n_ctx=max(512, len(tokens)), type_k=type_k) as peer:
        return peer.eval(tokens, 0)


def mean_kl(logits: np.ndarray, peer: np.ndarray) -> float:
    """Mean over tokens of KL(peer ‖ ours) in nats; both (n_tok, n_vocab)."""
    p, q = _log_softmax(peer), _log_softmax(logits)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def top1_agreement(logits: np.ndarray, peer: np.ndarray, margin: float = 0.2) -> float:
    """Share of the same most likely token, among tokens whose best logit leads by `margin` at the peer's."""
    best = np.sort(peer, axis=1)[:, -2:]
    clear = best[:, 1] - best[:, 0] > margin
    return float((logits.argmax(axis=1) == peer.argmax(axis=1))[clear].mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))
