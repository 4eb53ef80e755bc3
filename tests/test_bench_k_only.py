"""The variant that K-only is compared with stays a copy of the kernel; and the scripts' tables."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cpu_kernels.isa import ISA
from engine.engine import Engine
from engine.k_cache import TYPES_K

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))  # last, for it holds a test.py
import bench_k_only
import kl_type_k


@pytest.mark.skipif(not ISA.bf16, reason="the variant multiplies in bf16")
def test_the_variant_gives_the_bits_of_the_kernel_and_reads_its_own_values() -> None:
    bench_k_only.check()


def test_table_of_k_only() -> None:
    ns = {"K-only": 100.0, "K and V": 150.0, "K and V, prefetched": 110.0}
    row = {"n_kv": 4096, "threads": 2, "ns": ns, "read_gb_s": 40.0, "bf16_gmul_s": 480.0}
    lines = bench_k_only.markdown({"cpu": "znver5", "layers": 27, "rounds": 9, "rows": [row]}).splitlines()
    assert lines[2] == "| 4,096 | 2 | 100, 122 | 150, 230 | 1.50 × as fast | 110, 230 | 1.10 × as fast |"
    assert "DRAM 40.0 GB/s and bf16 480 · 10⁹ products/s with 2 threads" in lines[-1]


def test_the_text_for_kl_is_in_chunks_of_the_models_context_and_the_same_every_time() -> None:
    engine = Engine(n_threads=1)
    first, second = kl_type_k.chunks(engine, 2)
    assert first.shape == second.shape == (kl_type_k.CHUNK,)
    assert (first == next(kl_type_k.chunks(engine, 1))).all() and not (first == second).all()
    assert kl_type_k.CHUNK <= engine.hparams.n_ctx_train
    assert "named" in engine.detokenize(first)
    assert kl_type_k.predictions(engine, first[:3], "token").shape == (3, engine.hparams.n_vocab)
    engine.close()


def test_table_of_kl() -> None:
    rows = [
        {"type_k": k, "way": w, "kl": 2e-4, "kl_f16": 1e-4, "changes": 0.005} for k in TYPES_K for w in kl_type_k.WAYS
    ]
    text = kl_type_k.markdown({"model": "m.gguf", "tokens": 24_000, "chunk": 1000, "rows": rows})
    assert "| `f16` | f16, f16 | 1,152 | 2.0e-04, 2.0e-04 |  | 0.50%, 0.50% |" in text
    assert "| `q8` | int8, bf16 | 656 | 2.0e-04, 2.0e-04 | 1.0e-04, 1.0e-04 | 0.50%, 0.50% |" in text
