"""Every kernel compiles for every card that it is meant for, without spills; and what the compiler is given.

Needs NVIDIA's compiler library (the wheel nvidia-cuda-nvrtc, 90 MB) but no card. Without -m slow: mla_decode for
two types and all cards, everything else for the oldest and the newest.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest

from gpu_kernels import _compile, mha, moe
from gpu_kernels._compile import Kernel, Usage, compile_only, kernel
from gpu_kernels.attention import VARIANTS, choose
from gpu_kernels.attention import kernels as decode_kernels
from gpu_kernels.device import CARDS, Limits
from gpu_kernels.ffn import SWIGLU
from gpu_kernels.k_cache import TYPES_K
from gpu_kernels.k_cache import kernels as row_kernels
from gpu_kernels.prefill import COPY_ROPE
from gpu_kernels.quants import FORMATS, format_of
from gpu_kernels.router import ROUTE

matmul = importlib.import_module("gpu_kernels.matmul")
PRODUCTS = dict.fromkeys((*matmul.VARIANTS, *moe.VARIANTS))
LAYOUTS = [(512, 64), (256, 64), (256, 32), (128, 32)]
LANES = [16, 32, 128]
HEADS = [(512, 64, 128, 128), (512, 64, 192, 256), (256, 32, 64, 64), (256, 64, 64, 128)]  # rank, n_rot, nope, n_v
Case = tuple[Kernel, int, int]  # a kernel, a card's sm, dynamic shared memory


def decodes(card: Limits, layouts: list[tuple[int, int]], types: list[str], lanes: list[int]) -> Iterator[Case]:
    for rank, n_rot in layouts:
        for type_k in types:
            if card.sm < 80 and (type_k == "bf16" or rank == 512):
                continue
            for variant in dict.fromkeys(choose(card, type_k, rank, n_rot, n) for n in lanes):
                shared = variant.shared_bytes(type_k, rank, n_rot)
                yield decode_kernels(variant, type_k, rank, n_rot)[0], card.sm, shared


def others(card: Limits, layouts: list[tuple[int, int]]) -> Iterator[Case]:
    units = [SWIGLU, ROUTE, moe.ADD_SLOTS, COPY_ROPE, matmul.QUANTISE, matmul.ADD_SPLITS]
    units += [matmul.matvec(f, n) for f in FORMATS for n in (1, 4)]
    units += [kernel("embed.cu", "embed_rows", {"TYPE_ID": f}) for f in FORMATS]
    units += [row_kernels(t, *layout)["k_store"] for layout in layouts for t in TYPES_K]
    yield from ((unit, card.sm, 0) for unit in units)


def gemms(card: Limits, n_variants: int) -> Iterator[Case]:
    """Of each type: so many variants, the largest that fit."""
    for f in FORMATS:
        if format_of(f).name != "F32":
            for v in [v for v in PRODUCTS if v.fits(card, f)][:n_variants]:
                yield v.kernel(card, f), card.sm, v.shared_bytes(f)


def expanded(card: Limits, heads: list[tuple[int, int, int, int]], types: list[str]) -> Iterator[Case]:
    for rank, n_rot, nope, n_v in heads if card.has_bf16 else ():
        for type_k in types:
            yield mha.expand_kernels(type_k, rank, n_rot, nope, n_v)["expand"], card.sm, mha.EXPAND_SHARED
            for variant in {mha.choose(card, nope, n_rot, n_v, 512, n_past) for n_past in (0, 8192)} - {None}:
                shared = variant.shared_bytes(nope + n_rot, n_v)
                yield mha.kernels(variant, type_k, rank, n_rot, nope, n_v)[0], card.sm, shared


def widenings(card: Limits) -> Iterator[Case]:
    yield from ((mha.widen_kernel(f, t), card.sm, 0) for f in FORMATS for t in TYPES_K if card.has_bf16)


QUICK = [
    *(case for card in CARDS.values() for case in decodes(card, [LAYOUTS[card.sm < 80]], ["f16", "q8"], [16, 128])),
    *(case for sm in (75, 120) for case in others(CARDS[sm], [(512, 64)])),
    *(case for sm in (80, 90, 120) for case in expanded(CARDS[sm], HEADS[:2], ["f16"])),
    *((mha.widen_kernel(f, t), 90, 0) for f, t in ((0, "f16"), (8, "bf16"), (12, "q8"))),
    *(case for sm in (75, 80) for case in gemms(CARDS[sm], 1)),
]
ALL = [
    *(case for card in CARDS.values() for case in decodes(card, LAYOUTS, list(TYPES_K), LANES)),
    *(case for card in CARDS.values() for case in others(card, LAYOUTS)),
    *(case for card in CARDS.values() for case in expanded(card, HEADS, list(TYPES_K))),
    *(case for card in CARDS.values() for case in widenings(card)),
    *(case for card in CARDS.values() for case in gemms(card, len(PRODUCTS))),
]


@cache
def compiled() -> dict[Case, dict[str, Usage] | Exception]:
    """QUICK, on two threads: the library lets go of Python meanwhile."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(QUICK, pool.map(_try, QUICK)))


def _try(case: Case) -> dict[str, Usage] | Exception:
    try:
        return compile_only(*case[0].unit, case[1])
    except ValueError as error:
        return error


@pytest.fixture
def nvrtc() -> None:
    try:
        _compile.nvrtc()
    except OSError as error:
        pytest.skip(str(error))


def check(case: Case, usages: dict[str, Usage] | Exception) -> None:
    (unit, sm, shared), card = case, CARDS[case[1]]
    if isinstance(usages, Exception):
        raise usages
    assert set(usages) >= {unit.name} and set(usages) == set(_compile.kernel_names(unit.file))
    for name, usage in usages.items():
        assert usage.spills == 0, f"{name} spills {usage.spills} bytes on sm_{sm}"
        assert usage.shared + shared <= card.shared_per_block
    if unit.file == "gemm.cu":
        assert usages["gemm"].registers * 256 <= 65_536
    if unit.name == "mla_split":
        assert usages["mla_split"].registers * (256 if unit.file == "mla_decode.cu" else 384) <= 65_536
    if unit.file == "mha.cu":
        assert usages["mha"].registers * 32 * dict(unit.defines)["WARPS"] * dict(unit.defines)["BLOCKS"] <= 65_536


@pytest.mark.parametrize(
    "case", QUICK, ids=lambda c: f"{c[0].name}-{'-'.join(str(v) for _, v in c[0].defines)}-sm_{c[1]}"
)
def test_a_kernel_compiles_without_spills_and_fits_the_card(case: Case, nvrtc: None) -> None:
    check(case, compiled()[case])


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ALL, ids=lambda c: f"{c[0].name}-{'-'.join(str(v) for _, v in c[0].defines)}-sm_{c[1]}"
)
def test_every_instantiation_compiles_for_every_card(case: Case, nvrtc: None) -> None:
    check(case, _try(case))


def test_every_variant_is_some_card_s_choice() -> None:
    taken = {choose(card, t, *layout, n) for card in CARDS.values() if card.sm >= 80
             for layout in LAYOUTS for t in TYPES_K for n in LANES}  # fmt: skip
    assert taken == set(VARIANTS)


def test_headers_are_in_the_text_once_and_defines_before_them() -> None:
    text = _compile.source("k_cache.cu", [("KV_LORA_RANK", 512), ("N_ROT", 64)])
    assert text.startswith("#define KV_LORA_RANK 512\n#define N_ROT 64\n")
    assert "#include" not in text and text.count("void hadamard") == 1 == text.count("float warp_sum")


def test_a_changed_header_changes_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compile, "CUDA", tmp_path)
    (tmp_path / "changed.cu").write_text('#include "changed.cuh"\n')
    for text in ("one", "two"):
        (tmp_path / "changed.cuh").write_text(text)
        _compile.with_headers.cache_clear()
        assert _compile.source("changed.cu").strip() == text


def test_no_header_of_a_toolkit_is_needed() -> None:
    for path in _compile.CUDA.glob("*.cu*"):
        assert "#include <" not in path.read_text(encoding="utf-8"), path.name


def test_kernels_are_found_by_name() -> None:
    assert _compile.kernel_names("mla_decode.cu") == ["mla_combine", "mla_split"]
    assert _compile.kernel_names("small.cu") == ["rms_norm", "rope", "swiglu"]


def test_a_file_for_one_architecture_is_refused_for_others() -> None:
    assert _compile.arch_of("mla_decode_wgmma.cu", 90) == "90a" and _compile.arch_of("mha.cu", 90) == "90"
    with pytest.raises(ValueError, match="mla_decode_wgmma.cu is for sm_90a only, not for sm_100"):
        compile_only("mla_decode_wgmma.cu", (), 100)


def test_importing_the_package_and_naming_kernels_needs_no_cupy() -> None:
    code = "import sys, gpu_kernels; from gpu_kernels.ffn import SWIGLU; print('cupy' in sys.modules)"
    path = [str(_compile.CUDA.parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
