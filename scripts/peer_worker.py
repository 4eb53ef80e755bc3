"""Times llama.cpp or ik_llama.cpp in this process, as `konly bench` times konly. Started by bench_peers.py.

Runs under the Python of an environment that has llama-cpp-python or ik-llama-cpp-python, built for this machine
(pip install --no-binary), and NumPy; imports nothing of konly. The last line that it prints is one JSON object:

    {"version", "load_s", "decode_ms": {depth: [ms of each token]}, "prefill_s": {depth: [s of each run]}}
    {"version", "load_s"}   with --first-token, which ends after five tokens of a prompt, in a context of 4,096

A depth is reached as in `konly bench`: 256 tokens are computed, and their rows in the saved state of the sequence are
repeated. Reading and writing that state is all that is known of the peers' formats here.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import struct
import sys
import time
from types import ModuleType
from typing import Any

import numpy as np

N_REAL_TOKENS = 256
GGML_TYPES = {"f16": 1, "q8_0": 8, "bf16": 30}


class Peer:
    """A model and a context. api: the module that has the llama_* functions and structures."""

    api: Any
    package: str
    state_has_stream: bool
    seq_flags: tuple[int, ...]

    def __init__(self, args: argparse.Namespace, n_ctx: int) -> None:
        api = self.api
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self.library.llama_log_set(self._quiet, None)
        api.llama_backend_init()
        model_params, params = api.llama_model_default_params(), api.llama_context_default_params()
        model_params.n_gpu_layers = 0
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, 512, 512
        params.n_threads = params.n_threads_batch = args.threads
        params.type_k = GGML_TYPES[args.type_k]
        self.set_params(model_params, params, args)
        self.model = api.llama_model_load_from_file(args.model.encode(), model_params)
        self.ctx = api.llama_init_from_model(self.model, params) if self.model else None
        if not self.ctx:
            sys.exit(f"{args.model}: the peer does not load it")
        self.n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self.model))
        lib = self.library
        lib.llama_batch_init.restype, lib.llama_batch_init.argtypes = api.llama_batch, [ctypes.c_int32] * 3
        lib.llama_batch_free.restype, lib.llama_batch_free.argtypes = None, [api.llama_batch]
        lib.llama_decode.restype, lib.llama_decode.argtypes = ctypes.c_int32, [ctypes.c_void_p, api.llama_batch]
        for name, extra in (("get_data", [ctypes.c_void_p]), ("set_data", [ctypes.c_void_p])):
            function = getattr(lib, f"llama_state_seq_{name}")
            function.restype = ctypes.c_size_t
            function.argtypes = [ctypes.c_void_p, *extra, ctypes.c_size_t, ctypes.c_int32, *(ctypes.c_uint32,) * len(
                self.seq_flags)]  # fmt: skip
        lib.llama_state_seq_get_size.restype = ctypes.c_size_t
        lib.llama_state_seq_get_size.argtypes = [ctypes.c_void_p, ctypes.c_int32, *(ctypes.c_uint32,) * len(
            self.seq_flags)]  # fmt: skip

    @property
    def library(self) -> Any:
        return self.api._lib

    def set_params(self, model_params: Any, params: Any, args: argparse.Namespace) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def decode(self, tokens: np.ndarray, position: int) -> None:
        n = len(tokens)
        batch = self.library.llama_batch_init(n, 0, 1)
        batch.n_tokens = n
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), position + i, 1, i == n - 1
            batch.seq_id[i][0] = 0
        status = self.library.llama_decode(self.ctx, batch)
        self.library.llama_batch_free(batch)
        if status:
            sys.exit(f"llama_decode returned {status}")
        self.api.llama_get_logits_ith(self.ctx, -1 if n > 1 else 0)

    def state(self) -> bytes:
        size = self.library.llama_state_seq_get_size(self.ctx, 0, *self.seq_flags)
        buffer = ctypes.create_string_buffer(size)
        n = self.library.llama_state_seq_get_data(self.ctx, buffer, size, 0, *self.seq_flags)
        return buffer.raw[:n]

    def set_state(self, state: bytes) -> None:
        if self.library.llama_state_seq_set_data(self.ctx, state, len(state), 0, *self.seq_flags) != len(state):
            sys.exit("the peer does not take the repeated state")

    def repeat(self, state: bytes, n: int) -> bytes:
        """The state of N_REAL_TOKENS tokens, made one of n."""
        at, out = 0, []

        def take(fmt: str) -> int:
            nonlocal at
            (value,) = struct.unpack_from("<" + fmt, state, at)
            at += struct.calcsize("<" + fmt)
            return int(value)

        if self.state_has_stream:
            out.append(state[:12])  # magic, sequence, number of streams
            at = 12
        assert take("I") == N_REAL_TOKENS
        out.append(struct.pack("<I", n))
        n_seq = 0
        for _ in range(N_REAL_TOKENS):
            take("i")
            n_seq = take("I")
            at += 4 * n_seq
        for position in range(n):
            out.append(struct.pack("<iI", position, n_seq) + b"\0\0\0\0" * n_seq)
        out.append(state[at : at + 8])  # whether V is transposed, number of layers
        n_layer = struct.unpack_from("<I", state, at + 4)[0]
        at += 8
        for _ in range(n_layer):
            out.append(state[at : at + 12])  # type and bytes of a row
            row = struct.unpack_from("<Q", state, at + 4)[0]
            rows = state[at + 12 : at + 12 + row * N_REAL_TOKENS]
            out.append((rows * (n // N_REAL_TOKENS + 1))[: row * n])
            at += 12 + row * N_REAL_TOKENS
        assert len(state) - at <= 64, "the state has a V-cache: not an MLA cache"
        out.append(state[at:])
        return b"".join(out)


class LlamaCpp(Peer):
    package = "llama-cpp-python"
    state_has_stream, seq_flags = True, ()

    def __init__(self, args: argparse.Namespace, n_ctx: int) -> None:
        import llama_cpp.llama_cpp as api

        self.api = api
        super().__init__(args, n_ctx)

    def set_params(self, model_params: Any, params: Any, args: argparse.Namespace) -> None:
        model_params.use_extra_bufts = args.repack
        params.type_v = params.type_k
        params.flash_attn_type = 1
        params.swa_full = True

    def clear(self) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.ctx), False)


class IkLlamaCpp(Peer):
    package = "ik-llama-cpp-python"
    state_has_stream, seq_flags = False, (0,)

    def __init__(self, args: argparse.Namespace, n_ctx: int) -> None:
        from ik_llama_cpp import _ctypes_api as api

        self.api: ModuleType = api
        super().__init__(args, n_ctx)

    def set_params(self, model_params: Any, params: Any, args: argparse.Namespace) -> None:
        model_params.mla, model_params.flash_attn = 3, True
        model_params.repack_tensors, model_params.use_mmap = args.repack, not args.repack
        params.flash_attn, params.mla_attn, params.fused_moe_up_gate = True, 3, True

    def clear(self) -> None:
        self.library.llama_kv_cache_clear.argtypes = [ctypes.c_void_p]
        self.library.llama_kv_cache_clear(self.ctx)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["llama.cpp", "ik_llama.cpp"])
    parser.add_argument("model")
    parser.add_argument("--n-prompt", type=int, default=512)
    parser.add_argument("--n-gen", type=int, default=16)
    parser.add_argument("--n-runs", type=int, default=1)
    parser.add_argument("--depths", default="0", help="to decode at")
    parser.add_argument("--prompt-depths", help="to process a prompt at; else those of --depths")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--type-k", default="f16", choices=GGML_TYPES)
    parser.add_argument("--repack", action="store_true")
    parser.add_argument("--first-token", action="store_true")
    args = parser.parse_args()
    decode_at = [int(d) for d in args.depths.split(",")] if args.n_gen else []
    prompt_at = [int(d) for d in (args.prompt_depths or args.depths).split(",")] if args.n_prompt else []
    depths = sorted({*decode_at, *prompt_at, 0})

    n_ctx = -(-(max(depths) + max(N_REAL_TOKENS, args.n_prompt, args.n_gen) + 64) // 256) * 256
    start = time.perf_counter()
    peer = (LlamaCpp if args.peer == "llama.cpp" else IkLlamaCpp)(args, 4096 if args.first_token else n_ctx)
    load = time.perf_counter() - start
    result: dict[str, Any] = {"version": f"{peer.package} {importlib.metadata.version(peer.package)}", "load_s": load}
    if args.first_token:
        peer.decode(np.arange(1, 6), 0)
        _tell(result)
        return
    result |= {"decode_ms": {}, "prefill_s": {}}
    rng = np.random.default_rng(1)
    peer.decode(rng.integers(0, peer.n_vocab, N_REAL_TOKENS), 0)
    state = peer.state() if max(depths) else b""
    for depth in depths:
        repeated = peer.repeat(state, depth) if depth else b""

        def reach(repeated: bytes = repeated) -> None:
            peer.clear()
            if repeated:
                peer.set_state(repeated)

        if depth in decode_at:
            reach()
            times = []
            for i, token in enumerate(rng.integers(0, peer.n_vocab, args.n_gen + 1)):
                start = time.perf_counter()
                peer.decode(np.array([token]), depth + i)
                times.append((time.perf_counter() - start) * 1e3)
            result["decode_ms"][depth] = times[1:]
        for _ in range(args.n_runs if depth in prompt_at else 0):
            reach()
            tokens = rng.integers(0, peer.n_vocab, args.n_prompt)
            start = time.perf_counter()
            for i in range(0, args.n_prompt, 512):
                peer.decode(tokens[i : i + 512], depth + i)
            result["prefill_s"].setdefault(depth, []).append(time.perf_counter() - start)
    _tell(result)


def _tell(result: dict[str, Any]) -> None:
    print("\n" + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
