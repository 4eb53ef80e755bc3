"""The layout's numbers, and that the cache takes memory only as it fills."""

from __future__ import annotations

import subprocess
import sys

import pytest

from engine import EngineError, KCacheLayout
from engine.k_cache import KCache

V3 = {"n_layer": 61, "n_ctx": 163_840, "kv_lora_rank": 512, "n_rot": 64}


def test_deepseek_v3_at_160k_takes_10980_mib() -> None:
    layout = KCacheLayout(**V3, type_k="f16")
    assert layout.bytes_per_token * 163_840 / 2**20 == 10_980.0
    assert layout.nbytes == layout.bytes_per_token * 163_840


@pytest.mark.parametrize(
    ("kv_lora_rank", "n_rot", "type_k", "row_stride"),
    [
        (512, 64, "f16", 1152),
        (512, 64, "bf16", 1152),
        (512, 64, "q8", 656),
        (256, 64, "f16", 640),
        (256, 32, "q8", 336),
        (128, 32, "bf16", 320),
        (128, 32, "q8", 208),
    ],
)
def test_row_strides_are_multiples_of_16(kv_lora_rank: int, n_rot: int, type_k: str, row_stride: int) -> None:
    layout = KCacheLayout(1, 1, kv_lora_rank, n_rot, type_k)
    assert layout.row_stride == row_stride
    assert layout.row_stride % 16 == 0


def test_layers_start_on_pages() -> None:
    cache = KCache(KCacheLayout(3, 7, 128, 32, "q8"))
    assert [rows.ctypes.data % 4096 for rows in cache.rows] == [0, 0, 0]
    assert [rows.shape for rows in cache.rows] == [(7, 208)] * 3


def test_truncate_keeps_the_first_rows() -> None:
    cache = KCache(KCacheLayout(1, 8, 128, 32))
    cache.append(5)
    cache.truncate(3)
    assert cache.n_kv == 3


@pytest.mark.parametrize("n", [-1, 6, 2.5, None])
def test_truncate_refuses_what_is_not_held(n: object) -> None:
    cache = KCache(KCacheLayout(1, 8, 128, 32))
    cache.append(5)
    with pytest.raises(EngineError, match="expected 0 to n_kv = 5"):
        cache.truncate(n)  # type: ignore[arg-type]
    assert cache.n_kv == 5


def test_unknown_type_k_is_refused() -> None:
    with pytest.raises(EngineError, match="type_k is 'q4'; expected one of f16, bf16, q8"):
        KCacheLayout(1, 1, 128, 32, "q4")


MEMORY = """
import resource, sys
from engine import KCacheLayout
from engine.k_cache import KCache
def resident():
    with open('/proc/self/statm') as f: return int(f.read().split()[1]) * resource.getpagesize() / 2**20
cache = KCache(KCacheLayout(n_layer=27, n_ctx=163_840, kv_lora_rank=512, n_rot=64, type_k='f16'))
empty = resident()
for start in range(0, 16_384, 512):
    for rows in cache.rows: rows[start:start + 512] = 1
    cache.append(512)
print(empty, resident() - empty, cache.nbytes / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_16k_rows_of_27_layers_take_486_mib_and_there_is_no_hidden_v() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    empty, grown, counted = map(float, done.stdout.split())
    assert counted == 486.0
    assert empty < 200  # a cache of 160k tokens that holds none
    assert 486 <= grown < 486 + 16  # a page of slack in each layer, and what Python allocates
