"""What `konly plan` promises: sizes that are the engine's own, a longest context that fits, a run that stays below."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from synthetic import write_model

from engine import Engine, EngineError, memory
from engine.k_cache import TYPES_K, KCacheLayout
from engine.plan import plan

# Fills the cache, as a text of n_ctx tokens would, and goes through a step of every kind at its end. Peaks are those
# of 1 ms samples, and what is there in the end.
RUN = """
import json, sys, threading, time
from engine import Engine, memory
path, n_ctx, type_k, real = json.loads(sys.argv[1])
peak = [0, 0]
def look():
    peak[:] = map(max, peak, memory.resident())
def watch():
    while True:
        look()
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
engine = Engine(path, n_ctx=n_ctx, type_k=type_k)
if real:
    prompt = [i % 250 + 2 for i in range(n_ctx - 60)]
    text = "".join(engine.generate(prompt, max_tokens=60, seed=1, ignore_eos=True, speculate=True))
    assert engine.n_kv >= n_ctx - 1, engine.n_kv
else:
    n = n_ctx - engine.n_ubatch - 3
    for rows in engine.cache.rows:
        rows[:n] = 1
    engine.cache.n_kv, engine._tokens = n, list(range(10**6, 10**6 + n))
    engine.step([5] * engine.n_ubatch)
    for _ in range(3):
        engine.step([5])
    assert engine.n_kv == n_ctx
look()
print(json.dumps(peak))
"""
linux = pytest.mark.skipif(memory.resident() is None, reason="tells anonymous and mapped memory apart as Linux does")


def peak(path: Path | str | None, n_ctx: int, type_k: str, real: bool = False) -> tuple[int, int]:
    """(anonymous, mapped) bytes of a process that runs a model."""
    arguments = json.dumps([None if path is None else str(path), n_ctx, type_k, real])
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, arguments], capture_output=True, text=True, check=True, timeout=300
    )
    anonymous, mapped = json.loads(done.stdout)
    return anonymous, mapped


def told_by_konly(*arguments: str) -> dict[str, Any]:
    """The plan of a process of its own, as a user has it."""
    code = "from engine.cli import main; main(prog_name='konly')"
    command = [sys.executable, "-P", "-c", code, "plan", "--json", "--no-probe", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 1), done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python and the libraries are measured; pytest's are not the same twice."""
    monkeypatch.setattr(memory, "resident", lambda: (100 << 20, 100 << 20))


@pytest.fixture
def long(model_file: Path) -> Path:
    """A small model that was trained for a million tokens, they say."""
    return write_model(model_file, quant="q8_0", q_lora_rank=64, n_ctx_train=1_000_000)


@linux
def test_a_run_of_the_default_model_stays_under_its_plan() -> None:
    told_by_konly("-ctk", "f16")  # compiles what is missing, which takes Numba into memory
    told = told_by_konly("-ctk", "f16")
    anonymous, mapped = peak(None, told["n_ctx"], "f16", real=True)
    assert anonymous <= sum(told["anonymous"].values())
    assert mapped <= sum(told["mapped"].values())
    assert anonymous + mapped > 0.5 * told["total"]  # a plan that promises anything holds always


@linux
@pytest.mark.parametrize("type_k", ["f16", "q8"])
def test_a_run_with_the_longest_context_stays_under_the_given_memory(long: Path, type_k: str) -> None:
    ram, of = 300 << 20, (str(long), "--ram", "300MiB", "-ctk", type_k)
    told_by_konly(*of)  # compiles
    n_ctx = told_by_konly(*of)["largest_n_ctx"][type_k]
    told = told_by_konly(*of, "-c", str(n_ctx))
    assert 0.98 * ram < told["total"] < 1.02 * ram
    anonymous, mapped = peak(long, n_ctx, type_k)
    assert anonymous <= sum(told["anonymous"].values())
    assert mapped <= sum(told["mapped"].values())
    assert anonymous + mapped > 0.7 * ram


@linux
def test_weights_that_are_copied_at_load_are_counted(model_file: Path) -> None:
    write_model(model_file, form="legacy", quant="f16", q_lora_rank=64)
    engine = Engine(model_file)
    copied = plan(model_file, probe=False)["anonymous"]["weights"]
    assert copied == sum(layer.w_uk.nbytes for layer in engine.model.weights.attention) > 0


@pytest.mark.parametrize("type_k", TYPES_K)
@pytest.mark.usefixtures("fixed")
def test_the_longest_context_fits_and_a_page_more_does_not(long: Path, type_k: str) -> None:
    longest = plan(long, ram=400 << 20, type_k=type_k, probe=False)["largest_n_ctx"][type_k]
    assert 10_000 < longest < 1_000_000
    for n_ctx, fits in ((longest, True), (longest + 100, False)):
        assert plan(long, ram=400 << 20, n_ctx=n_ctx, type_k=type_k, probe=False)["fits"] == fits


def test_the_cache_has_the_bytes_of_its_rows_to_the_page(long: Path) -> None:
    told = plan(long, ram=8 << 30, n_ctx=5000, type_k="q8", probe=False)
    rows = KCacheLayout(3, 5000, 128, 32, "q8").nbytes
    assert rows <= told["anonymous"]["k_cache"] < rows + 3 * 16384


def test_no_context_is_longer_than_the_model_was_trained_for() -> None:
    told = plan(ram=8 << 30, probe=False)
    assert told["largest_n_ctx"] == dict.fromkeys(TYPES_K, told["n_ctx_train"])


def test_nothing_fits_into_too_little(long: Path) -> None:
    told = plan(long, ram=10 << 20)
    assert (told["fits"], told["times"]) == (False, None)
    assert told["largest_n_ctx"] == dict.fromkeys(TYPES_K, 0)


@pytest.mark.usefixtures("fixed")
def test_prefixes_count() -> None:
    without, with_them = (plan(ram=8 << 30, prefix_bytes=n, probe=False) for n in (0, 1 << 30))
    assert with_them["anonymous"]["prefixes"] == 1 << 30
    assert with_them["total"] - without["total"] == 1 << 30


def test_times_grow_with_prompt_and_depth(long: Path) -> None:
    times: dict[str, Any] = plan(long, ram=8 << 30, n_ctx=60_000)["times"]
    for found in (times["first_token_s"], times["decode_ms"]):
        assert list(found) == sorted(found)
        assert list(found.values()) == sorted(found.values())
        assert min(found.values()) > 0
    assert set(times["limits"]) >= {"read_gb_s", "f32_gmul_s"}


def test_ram_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: None)
    with pytest.raises(EngineError, match="give --ram"):
        plan()
