"""What `konly bench` tells: its shape, that parts add up to the step, and that the work it counts is the file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import write_model

from cpu_kernels import roofline
from engine import bench
from engine.engine import Engine
from engine.k_cache import TYPES_K
from engine.parts import PARTS, Work, by_part, part_of, work_of


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "TILES", 1)
        patch.setattr(roofline, "READ_BYTES", 8 << 20)
        return bench.run(n_prompt=(0, 40, 100), n_gen=5, depths=(0, 300), threads=(1,), type_k=("f16", "q8"))


def test_limits_are_those_of_each_number_of_threads(told: dict[str, Any]) -> None:
    (limits,) = told["limits"].values()
    assert list(told["limits"]) == ["1"]
    assert set(limits) == {"read_gb_s"} | {f"{kind}_gmul_s" for kind, there in roofline.KINDS.items() if there}
    assert all(value > 0 for value in limits.values())


def test_every_combination_is_a_row(told: dict[str, Any]) -> None:
    cases = [(kind, 1, depth) for kind in ("f16", "q8") for depth in (0, 300)]
    assert [(row["type_k"], row["threads"], row["depth"]) for row in told["decode"]] == cases
    assert [(row["type_k"], row["threads"], row["depth"], row["tokens"]) for row in told["prefill"]] == [
        (*case, n) for case in cases for n in (40, 100)
    ]
    for row in told["decode"]:
        assert set(row) == {"type_k", "threads", "depth", "ms_per_token", "min", "max", "parts"}
        assert 0 < row["min"] <= row["ms_per_token"] <= row["max"]
    for row in told["prefill"]:
        assert set(row) == {"type_k", "threads", "depth", "tokens", "tokens_per_s", "min", "max", "parts"}
        assert 0 < row["min"] <= row["tokens_per_s"] <= row["max"]


def test_parts_add_up_to_the_step_and_have_their_shares(told: dict[str, Any]) -> None:
    for row in told["decode"] + told["prefill"]:
        whole = row["ms_per_token"] if "ms_per_token" in row else 1e3 / row["tokens_per_s"]
        assert list(row["parts"]) == list(PARTS)
        assert sum(part["ms"] for part in row["parts"].values()) == pytest.approx(whole)
        rest = row["parts"].pop("rest")
        assert rest["ms"] > 0 and rest["of_read"] is rest["of_peak"] is None
        for part in row["parts"].values():
            assert part["ms"] > 0 and part["of_read"] > 0 and part["of_peak"] > 0


def test_a_prompt_alone_and_shorter_than_the_rows_that_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "TILES", 1)
    monkeypatch.setattr(roofline, "READ_BYTES", 8 << 20)
    named: list[str] = []
    told = bench.run(n_prompt=(40,), n_gen=0, threads=(1,), tell=named.append)
    assert not told["decode"] and len(told["prefill"]) == 1
    assert named == ["a prompt of 40 tokens at depth 0, f16, threads: 1"]


def test_a_step_that_is_timed_is_a_step() -> None:
    engine = Engine(n_threads=1)
    tokens = np.array([5, 6, 7])
    expected = engine.step(tokens)
    engine.clear()
    seconds, parts = bench._time(engine, tokens)
    assert engine.n_kv == 3
    assert sum(parts.values()) == pytest.approx(seconds) and min(parts.values()) > 0
    engine.clear()
    assert np.array_equal(engine.step(tokens), expected)  # by replay() again
    engine.close()


@pytest.mark.parametrize("form", ["modern", "2d", "legacy"])
def test_a_token_reads_each_weight_but_the_experts_it_does_not_use(form: str, tmp_path: Path) -> None:
    engine = Engine(write_model(tmp_path / "toy.gguf", form=form, q_lora_rank=64), n_ctx=64)
    work = work_of(engine, 1, 9)
    unused = ("token_embd",) if form == "legacy" else ("token_embd", "attn_kv_b")  # 2-D files have both forms
    matrices = {n: t for n, t in _tensors(engine).items() if len(t.shape) > 1 and not any(u in n for u in unused)}
    experts = sum(t.nbytes for name, t in matrices.items() if "_exps" in name)
    dense = sum(t.nbytes for name, t in matrices.items() if "_exps" not in name)
    assert work["experts"].nbytes == experts * engine.hparams.n_expert_used / engine.hparams.n_expert
    assert work["dense"].nbytes == dense
    assert work["attention"].nbytes == 10 * engine.cache.layout.bytes_per_token
    assert work["rest"] == Work()
    engine.close()


def test_products_of_attention_by_hand(tmp_path: Path) -> None:
    engine = Engine(write_model(tmp_path / "toy.gguf"), n_ctx=2048, type_k="f16")
    hp = engine.hparams
    heads, rank = hp.n_layer * hp.n_head, hp.kv_lora_rank
    few = work_of(engine, 2, 100)["attention"]  # the first sees 101 rows, the second 102
    assert few.products == {"f32": heads * 203 * (2 * rank + hp.n_rot)}
    many = work_of(engine, 600, 0)["attention"]  # 512, then 88 after them; K and V are expanded for each
    pairs, expanded, widths = 600 * 601 // 2, 512 + 600, hp.n_embd_head_nope + hp.n_embd_head_v
    assert many.products == {"f32": heads * (pairs * (widths + hp.n_rot) + expanded * rank * widths)}
    engine.close()


@pytest.mark.parametrize("n_tok", [1, 80])
@pytest.mark.parametrize("type_k", TYPES_K)
def test_kinds_of_product_are_those_that_the_kernels_are_compiled_for(type_k: str, n_tok: int, tmp_path: Path) -> None:
    engine = Engine(write_model(tmp_path / "toy.gguf", quant="q4_k"), type_k=type_k, n_ctx=128)
    work = work_of(engine, n_tok, 0)
    names = engine._record(n_tok, 0, 1)[1].names

    def kinds(start: str) -> set[str]:
        return {name.split("kind=")[1].split("-")[0] for name in names if name.startswith(start) and "kind=" in name}

    assert kinds("attention.decode_split" if n_tok == 1 else "prefill.attend") <= set(work["attention"].products)
    if n_tok > 1:
        assert kinds("moe.") == set(work["experts"].products)
        assert kinds("panels.multiply") <= set(work["dense"].products)
    engine.close()


def test_shares_of_the_limits() -> None:
    work = Work(nbytes=2e9)
    work.multiply("int8", 3e9)
    work.multiply("bf16", 1e9)
    limits = {"read_gb_s": 40.0, "bf16_gmul_s": 100.0, "int8_gmul_s": 200.0}
    assert work.shares(0.1, limits) == {"of_read": pytest.approx(0.5), "of_peak": pytest.approx(0.25)}
    assert Work().shares(0.1, limits) == {"of_read": None, "of_peak": None}


def test_kernels_belong_to_parts_by_their_names() -> None:
    profile = [("attention.decode_split-type_k=f16", 1.0), ("prefill.attend-kind=f32", 2.0), ("norm.rms_norm_row", 4.0),
               ("moe.gate_up", 8.0), ("matmul.dot_rows", 16.0), ("matmul.decode_row", 32.0)]  # fmt: skip
    assert by_part(profile) == {"attention": 3.0, "experts": 8.0, "dense": 16.0, "rest": 36.0}
    assert part_of("panels.multiply-kind=int8") == "dense" and part_of("panels.pack_rows-kind=int8") == "rest"


def _tensors(engine: Engine) -> dict[str, Any]:
    from engine.gguf_file import read

    return dict(read(engine.path).tensors)
