"""Engine on a card, which is the shim: the same texts as on the CPU, sessions that move, where a model is placed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from compare import assert_relative_rms
from shim import instances
from shim_card import ShimOps, card
from synthetic import write_model

import engine.backend
from engine import BackendError, Cancelled, Engine, hybrid
from engine.cli import main
from engine.k_cache import TYPES_K
from engine.parts import PARTS, part_of
from engine.placing import Shape, need
from engine.plan_card import plan_card
from gpu_kernels.attention import choose
from gpu_kernels.attention import kernels as decode_kernels
from gpu_kernels.device import CARDS
from gpu_kernels.k_cache import kernels as row_kernels
from gpu_kernels.stream import Call, Feed, name_of

matmul = importlib.import_module("gpu_kernels.matmul")
instances(k for t in TYPES_K for n in (3, 12) for k in decode_kernels(choose(CARDS[90], t, 128, 32, n), t, 128, 32))
instances(row_kernels(t, 128, 32)["k_store"] for t in TYPES_K)
instances(matmul.matvec(f, n) for f in (0, 8) for n in (1, 4))
instances([matmul.VARIANTS[-1].kernel(CARDS[90], 8)])

PROMPT, MORE = [3, 141, 59, 26], [5]
SHAPE = Shape(n_ctx=64, type_k="q8", n_ubatch=32, min_mha_tokens=64)  # of open_on
TOLERANCE = 2e-2  # of the logits' rms, as test_model.py says


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "toy.gguf", quant="q8_0", n_layer=2)


@pytest.fixture
def shim(monkeypatch: pytest.MonkeyPatch) -> ShimOps:
    backend, ops = card()
    monkeypatch.setattr(engine.backend, "gpu", lambda: backend)
    return ops


def open_on(backend: str, path: Path, **arguments: Any) -> Engine:
    return Engine(path, **{"n_ctx": 64, "n_ubatch": 32, "backend": backend, **arguments})


@pytest.fixture
def both(path: Path, shim: ShimOps) -> Iterator[tuple[Engine, Engine]]:
    """(on the CPU, on the card)"""
    engines = open_on("cpu", path), open_on("gpu", path)
    yield engines
    for one in engines:
        one.close()


def test_steps_give_the_cpu_s_logits_recorded_and_replayed(both: tuple[Engine, Engine]) -> None:
    cpu, gpu = both
    assert (cpu.backend, gpu.backend) == ("cpu", "gpu")
    for tokens in (PROMPT, MORE, MORE, MORE):
        assert_relative_rms(gpu.step(tokens, logits="all"), cpu.step(tokens, logits="all"), TOLERANCE)


def test_a_session_of_the_cpu_goes_on_on_the_card_and_back(both: tuple[Engine, Engine], tmp_path: Path) -> None:
    for start, end in (both, both[::-1]):
        start.clear()
        start.step(PROMPT)
        start.save(tmp_path / "session")
        end.load(tmp_path / "session")
        assert end.tokens == PROMPT
        assert_relative_rms(end.step(MORE), start.step(MORE), TOLERANCE)


@pytest.mark.parametrize("type_k", TYPES_K)
def test_a_shift_leaves_the_rows_that_it_leaves_on_the_cpu(path: Path, shim: ShimOps, type_k: str) -> None:
    cpu, gpu = open_on("cpu", path, type_k=type_k), open_on("gpu", path, type_k=type_k)
    cpu.step(PROMPT + MORE)
    gpu._restore(cpu.tokens, 0, cpu.cache.copy(cpu.n_kv))
    for one in (cpu, gpu):
        one.shift(2, 1)
    for il in range(cpu.hparams.n_layer):
        assert np.array_equal(cpu.cache.layer(il, cpu.n_kv), gpu.cache.layer(il, gpu.n_kv))
    assert cpu.tokens == gpu.tokens


def test_a_prompt_that_a_stream_comes_back_to_is_not_computed_again(path: Path, shim: ShimOps) -> None:
    gpu = open_on("gpu", path)
    prompts = [[7 * i % 300 for i in range(40)], [11 * i % 300 for i in range(40)]]
    for prompt in (*prompts, prompts[0]):
        list(gpu.generate(prompt, max_tokens=1, temperature=0.0))
    assert gpu.stats.n_reused == 40


def test_texts_of_a_batch_are_those_of_lone_streams(path: Path, shim: ShimOps) -> None:
    gpu = open_on("gpu", path)
    prompts = [[3, 141, 59], [26, 5]]
    alone = ["".join(gpu.generate(prompt, max_tokens=3, temperature=0.0)) for prompt in prompts]
    assert gpu.generate_many(prompts, max_tokens=3, temperature=0.0) == alone


@pytest.mark.parametrize("n_prompt", [1, 20])
def test_experts_on_the_cpu_give_the_same_logits(path: Path, shim: ShimOps, n_prompt: int) -> None:
    cpu, gpu = open_on("cpu", path), open_on("gpu", path, experts="cpu")
    assert gpu.backend == "gpu, experts on the CPU"
    prompt = [7 * i % 300 for i in range(n_prompt)]
    for tokens in (prompt, MORE, MORE):
        assert_relative_rms(gpu.step(tokens), cpu.step(tokens), TOLERANCE)


def test_a_long_prompt_brings_the_experts_to_the_card(
    path: Path, shim: ShimOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hybrid, "STREAM_TOKENS", 20)
    cpu, gpu = open_on("cpu", path), open_on("gpu", path, experts="cpu")
    prompt = [7 * i % 300 for i in range(20)]
    tape = gpu._record(20, 0, 1)[1]
    assert any(isinstance(job, Feed) for job in tape.jobs) and not any(isinstance(job, Call) for job in tape.jobs)
    assert_relative_rms(gpu.step(prompt), cpu.step(prompt), TOLERANCE)


@pytest.mark.parametrize("n_tok", [1, 20])
def test_kernels_belong_to_the_parts_that_a_bench_tells(path: Path, shim: ShimOps, n_tok: int) -> None:
    gpu, in_ram = open_on("gpu", path, min_mha_tokens=20), open_on("gpu", path, experts="cpu")
    for one in (gpu, in_ram):
        names = {name_of(job) for job in one._record(n_tok, 0, 1)[1].jobs}
        assert {part_of(name) for name in names} == set(PARTS)
        attention = {name.split(".")[0] for name in names if part_of(name) == "attention"}
        assert attention == {"prefill" if one.model.min_mha_tokens <= n_tok else "mla_decode"}


def test_a_cancelled_step_leaves_the_rows_that_were_there(path: Path, shim: ShimOps) -> None:
    gpu = open_on("gpu", path)
    expected = gpu.step(PROMPT)
    run = gpu._run
    launch = run._launch

    def cancelling(*args: Any) -> None:
        run.cancel[0] = 1
        launch(*args)

    run._launch = cancelling
    with pytest.raises(Cancelled):
        gpu.step(MORE)
    run._launch = launch
    assert gpu.n_kv == len(PROMPT)
    gpu.clear()
    assert np.array_equal(gpu.step(PROMPT), expected)


# ------------------------------------------------------------------------------------------- where a model is placed


def test_weights_take_what_was_planned(path: Path, shim: ShimOps) -> None:
    backend, _ = card()
    parts = need(open_on("cpu", path).model.weights, backend, SHAPE)
    open_on("gpu", path)
    assert 0 <= parts["weights"] - shim.taken < 512 * shim.n_taken


@pytest.mark.parametrize(
    "share, expected", [(1.01, "gpu"), (0.99, "gpu, experts on the CPU"), (0.1, "cpu")], ids=["all", "most", "little"]
)
def test_auto_takes_what_fits(path: Path, monkeypatch: pytest.MonkeyPatch, share: float, expected: str) -> None:
    monkeypatch.setattr(engine.placing, "SLACK", 0)
    backend, _ = card()
    total = sum(need(open_on("cpu", path).model.weights, backend, SHAPE).values())
    backend, _ = card(int(share * total))
    monkeypatch.setattr(engine.backend, "gpu", lambda: backend)
    assert open_on("auto", path).backend == expected


def test_too_little_memory_is_one_sentence_before_anything_is_brought_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, ops = card(1 << 20)
    monkeypatch.setattr(engine.backend, "gpu", lambda: backend)
    with pytest.raises(BackendError, match=r"H100: this run takes [\d.]+ GiB .* lower n_ctx, take type_k q8, or use"):
        open_on("gpu", path)
    assert not ops.taken


def test_auto_without_a_card_is_the_cpu_and_gpu_says_what_is_missing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_card() -> None:
        raise BackendError("backend 'gpu' asked for, but CuPy is not installed")

    monkeypatch.setattr(engine.backend, "gpu", no_card)
    assert open_on("auto", path).backend == "cpu"
    with pytest.raises(BackendError, match="CuPy is not installed"):
        open_on("gpu", path)


# ---------------------------------------------------------------------------------------------------- the commands


def told_by_konly(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_plan_tells_the_card_s_parts_and_the_longest_context(path: Path, shim: ShimOps) -> None:
    told = plan_card(path, ram=8 << 30, n_ctx=64)
    assert told is not None and told["fits"] and told["card"] == "H100" and told["experts"] == 0
    assert sum(told["on_card"].values()) == told["total"]
    hybrid = plan_card(path, experts="cpu", ram=8 << 30, n_ctx=64)
    assert hybrid is not None and hybrid["experts"] > 0 and hybrid["total"] < told["total"]
    n = plan_card(path, ram=told["total"] + (64 << 10), n_ctx=64)["largest_n_ctx"]["q8"]  # type: ignore[index]
    for n_ctx, fits in ((n, True), (n + 1, False)):
        assert plan_card(path, ram=told["total"] + (64 << 10), n_ctx=n_ctx)["fits"] == fits  # type: ignore[index]


def test_plan_of_the_command_line_names_the_card_and_ends_with_1_if_it_does_not_fit(path: Path, shim: ShimOps) -> None:
    fits = told_by_konly("plan", path, "--backend", "gpu", "--ram", "8GiB")
    assert fits.exit_code == 0 and "gpu: H100" in fits.output and "weights, on the card" in fits.output
    assert told_by_konly("plan", path, "--backend", "gpu", "--ram", "1MiB").exit_code == 1


def test_run_says_what_auto_has_picked(path: Path, shim: ShimOps) -> None:
    told = told_by_konly("run", path, "-p", "ab", "-n", 1, "--backend", "auto", "-c", 32)
    assert told.exit_code == 0 and "Note: runs on the gpu\n" in told.stderr
