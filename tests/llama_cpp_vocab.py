"""The tokenizer of llama.cpp, loaded from a GGUF file without weights: `LlamaCppVocab(path)`."""

from __future__ import annotations

import ctypes as C
import os

from llama_cpp_peer import _library

_P, _I, _B, _IDS = C.c_void_p, C.c_int32, C.c_bool, C.POINTER(C.c_int32)
_FUNCTIONS: dict[str, tuple] = {  # name: result, arguments; beside those of llama_cpp_peer
    "llama_vocab_bos": (_I, _P),
    "llama_vocab_eos": (_I, _P),
    "llama_vocab_get_add_bos": (_B, _P),
    "llama_vocab_get_add_eos": (_B, _P),
    "llama_vocab_is_eog": (_B, _P, _I),
    "llama_vocab_is_control": (_B, _P, _I),
    "llama_detokenize": (_I, _P, _IDS, _I, C.c_char_p, _I, _B, _B),
}


class LlamaCppVocab:
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._lib = lib = _library()
        for name, (result, *arguments) in _FUNCTIONS.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        params = lib.llama_model_default_params()
        params.vocab_only, params.n_gpu_layers = True, 0
        self._model = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise RuntimeError(f"{path}: llama.cpp does not load it")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        self.bos_id: int = lib.llama_vocab_bos(self._vocab)
        self.eos_id: int = lib.llama_vocab_eos(self._vocab)
        self.add_bos: bool = lib.llama_vocab_get_add_bos(self._vocab)
        self.add_eos: bool = lib.llama_vocab_get_add_eos(self._vocab)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        raw = text.encode()
        ids = (_I * (len(raw) + 8))()
        n = self._lib.llama_tokenize(self._vocab, raw, len(raw), ids, len(ids), add_special, parse_special)
        return list(ids[:n])

    def decode(self, ids: list[int]) -> str:
        """Without control tokens."""
        size = 16 * len(ids) + 64
        text = C.create_string_buffer(size)
        n = self._lib.llama_detokenize(self._vocab, (_I * len(ids))(*ids), len(ids), text, size, True, False)
        return text.raw[:n].decode(errors="replace")

    def eog_ids(self) -> set[int]:
        return {i for i in range(self.n_vocab) if self._lib.llama_vocab_is_eog(self._vocab, i)}

    def is_control(self, token: int) -> bool:
        return bool(self._lib.llama_vocab_is_control(self._vocab, token))

    def close(self) -> None:
        self._lib.llama_model_free(self._model)

    def __enter__(self) -> LlamaCppVocab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
