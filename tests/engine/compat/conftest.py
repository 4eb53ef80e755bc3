"""One Llama for all files of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.compat import Llama
from engine.engine import default_model


@pytest.fixture(scope="session")
def one_llama() -> Iterator[Llama]:
    llama = Llama(default_model(), n_ctx=256, seed=7, verbose=False)
    yield llama
    llama.close()


@pytest.fixture
def llama(one_llama: Llama) -> Llama:
    """As if it had just been opened."""
    one_llama.reset()
    one_llama.set_seed(7)
    return one_llama
