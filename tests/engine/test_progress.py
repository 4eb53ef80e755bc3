"""How far a prompt is: told within an ubatch, too, which may take many seconds."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import write_model

from engine import Engine

TOKENS = np.random.default_rng(7).integers(2, 258, 700).tolist()


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An ubatch takes it many of the slices of time after which a callback is called."""
    path = write_model(tmp_path_factory.mktemp("slow") / "slow.gguf", q_lora_rank=64, n_embd=1024, n_ff=2048, n_head=16)
    return Engine(path, n_ctx=1024)


def test_progress_moves_within_an_ubatch_and_never_back(slow: Engine) -> None:
    slow.clear()
    told: list[tuple[int, int]] = []
    list(slow.generate(TOKENS, max_tokens=1, progress=lambda *now: told.append(now)))
    done = [d for d, _ in told]
    assert {total for _, total in told} == {700}
    assert done == sorted(done) and done[0] == 0 and done[-1] == 700
    assert any(0 < d < 512 for d in done), "within the first ubatch"
    assert any(512 < d < 700 for d in done), "within the last"


def test_an_error_of_the_callback_ends_the_step_at_once(slow: Engine) -> None:
    slow.clear()

    def progress(done: int, total: int) -> None:
        if done % 512:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(slow.generate(TOKENS, max_tokens=1, progress=progress))
    assert slow.n_kv == 0
    assert len(list(slow.generate(TOKENS[:5], max_tokens=1))) <= 1  # and the engine goes on


def test_a_callback_that_begins_another_step_is_told_so(slow: Engine) -> None:
    """Both would be on the same threads."""
    slow.clear()
    other = slow.stream()

    def progress(done: int, total: int) -> None:
        if done % 512:
            other.step([5])

    with pytest.raises(RuntimeError, match="begun in the progress callback of another"):
        list(slow.generate(TOKENS, max_tokens=1, progress=progress))
    other.step([5])
