"""Do the tests notice a broken kernel? python mutants.py [-j N] [WORD]      minutes; exit 1 if one goes unseen

Each mutant is the kernels' source with one change; the tests of that kernel must fail. WORD: only mutants with it in
their names.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CUDA = ROOT / "gpu_kernels" / "cuda"
PATH = [str(ROOT), str(ROOT / "tests"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
TESTS = {
    "mla_decode.cu": "test_attention.py", "mla_decode_wgmma.cu": "test_attention.py", "mla.cuh": "test_attention.py",
    "mla_tiles.cuh": "test_attention.py", "hadamard.cuh": "test_k_cache.py", "k_cache.cu": "test_k_cache.py",
    "reduce.cuh": "test_k_cache.py", "matvec.cu": "test_matmul.py", "blocks.cuh": "test_quants.py",
    "quantise.cu": "test_matmul.py", "gemm.cu": "test_matmul.py", "splits.cu": "test_matmul.py",
    "narrow.cuh": "test_matmul.py", "mha.cu": "test_prefill.py", "expand.cu": "test_prefill.py",
    "widen.cu": "test_prefill.py", "route.cu": "test_small.py", "experts.cu": "test_moe.py",
}  # fmt: skip
# file, what is there, what the mutant has
CHANGES = [
    ("mla_decode.cu", "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    ("mla_decode.cu", "load(t + STAGES - 1);", "load(t + STAGES);"),
    (
        "mla_decode.cu",
        "chunk_at(lane & 15, w * OUT + j * 2 + (lane >> 4))",
        "(lane & 15) * PITCH + w * OUT + j * 2 + (lane >> 4)",
    ),
    ("mla_decode.cu", "o[i][j][0] *= f0;", ""),
    ("mla_decode.cu", "o[i][j][2] *= f1;", "o[i][j][2] *= f0;"),
    ("mla_decode.cu", "x[i] = tok < lim", "x[i] = tok <= lim"),
    ("mla_decode.cu", "const bool ok = tok < last;", "const bool ok = true;"),
    ("mla_decode.cu", "ldsm_x4_t(b, ", "ldsm_x4(b, "),
    ("mla_decode.cu", "mma16816<T>(o[i][j], p[i], b[0], b[1])", "mma16816<T>(o[i][j], p[i], b[1], b[0])"),
    ("mla_decode.cu", "l_run = l_run * fade + sum;", "l_run = l_run + sum;"),
    ("mla_decode.cu", "c + lc < CHUNKS;", "true;"),
    ("mla_decode.cu", "const float scale = *(const float*)(raw + C + 2 * R);", "const float scale = 0.01f;"),
    ("mla.cuh", "const float x = e.y * ex2(e.x - m);", "const float x = ex2(e.x - m);"),
    ("mla.cuh", "s < n; s += 8", "s < n - 1; s += 8"),
    ("mla.cuh", "x & 0xffff0000u", "x << 16"),
    ("mla_tiles.cuh", "if (t > range.t_beg) barrier_wait(", "if (part > 1) barrier_wait("),
    (
        "mla_tiles.cuh",
        "if (t > range.t_beg) barrier_wait(barriers + 8 * (EMPTY + 2 * w + part), phase);\n        const u32",
        "const u32",
    ),
    ("mla_tiles.cuh", "ok[j] = tok < range.last;", "ok[j] = true;"),
    ("mla_tiles.cuh", "tok < range.last ? tok : 0", "true ? tok : 0"),
    ("mla_tiles.cuh", "((2 * c) ^ (r & 7))", "(2 * c)"),
    ("mla_tiles.cuh", "const bool in_row = c < R / 8;", "const bool in_row = true;"),
    ("mla_tiles.cuh", "next_raw(j, part == 1 ? half_of(1 - w, 0)", "next_raw(j, part == 1 ? half_of(w, 0)"),
    ("mla_decode_wgmma.cu", "barrier_wait(barriers + 8 * (FULL + 2 * w + part), phase);", ""),
    ("mla_decode_wgmma.cu", "barrier_wait(barriers + 8 * (P_OF_A + tile), phase);", ""),
    ("mla_decode_wgmma.cu", "barrier_wait(barriers + 8 * BOTH, 0);", ""),
    ("mla_decode_wgmma.cu", "barrier_wait(barriers + 8 * BOTH, 1);", ""),
    ("mla_decode_wgmma.cu", "products_wait<0>(o);", ""),
    ("mla_decode_wgmma.cu", "products_wait<0>(s);", ""),
    ("mla_decode_wgmma.cu", "barrier_init(barriers + 8 * P_OF_A, 256);", "barrier_init(barriers + 8 * P_OF_A, 128);"),
    ("mla_decode_wgmma.cu", "scale_by(o, x.fade);\n      own_values", "own_values"),
    ("mla_decode_wgmma.cu", "scale_by(o, x.fade);\n        own_values", "own_values"),
    ("mla_decode_wgmma.cu", "x.l[h] *= x.fade[h];", ""),
    ("mla_decode_wgmma.cu", "(t + 1) * TOKENS <= least", "(t + 1) * TOKENS <= range.last"),
    ("mla_decode_wgmma.cu", "(i >> 1 ^ lane >> 2)", "(i >> 1)"),
    ("mla_decode_wgmma.cu", "p + 4 * k, v_at + k * ROWS_ON", "p + 4 * k, v_at + k * STEP"),
    ("mla_decode_wgmma.cu", "sums[8 * h] + sums[LANES + 8 * h]", "2.f * sums[8 * h]"),
    ("mla_decode_wgmma.cu", "(c % 8 ^ (r & 7))", "(c % 8)"),
    (
        "mla_decode_wgmma.cu",
        "product_64<T>(s, a + on, b + on, part + i > 0)",
        "product_64<T>(s, a + on, b + on, i > 0)",
    ),
    ("hadamard.cuh", "x[i + h] = u - v;", "x[i + h] = v - u;"),
    ("hadamard.cuh", "constexpr int BLOCK = N & -N;", "constexpr int BLOCK = N & -N & 127 ? N & -N & 127 : 128;"),
    ("k_cache.cu", "+ 128) << 8 * j", "+ 127) << 8 * j"),
    ("k_cache.cu", "fminf(fmaxf(v, -65504.f), 65504.f)", "v * 1.002f"),
    ("k_cache.cu", "rope[p.b] = v.y;", "rope[p.b] = -v.y;"),
    ("reduce.cuh", "i < N / 32", "i < N / 32 - 1"),
    ("blocks.cuh", "a >> 6 << 4", "a >> 5 << 4"),
    ("blocks.cuh", "48 : 16) + 32 * step", "48 : 16) + 32 * (step ^ 1)"),
    ("blocks.cuh", "FIVE_BITS ? 16 : 8", "FIVE_BITS ? 15 : 8"),
    ("blocks.cuh", "(n & 0x8888u) >> 1", "(n & 0x8880u) >> 1"),
    ("blocks.cuh", "low | (qh[j] >> i", "low | (qh[j] >> g"),
    ("blocks.cuh", "mask[j] >> group", "mask[j] >> (group & 3)"),
    ("blocks.cuh", "2 * (group >> 1)", "2 * (group & 1)"),
    ("blocks.cuh", "two >> (8 * h + 4) & 15", "two >> 4 & 15"),
    ("matvec.cu", "if (HAS_MINIMUM) acc[t] -=", "if (TYPE_ID == 12) acc[t] -="),
    ("matvec.cu", "mine == 0 && ok", "mine == 0"),
    ("quantise.cu", "(u32)other << 16", "(u32)sum << 16"),
    ("mha.cu", "tok > mine + 16 * i", "tok >= mine + 16 * i"),
    ("mha.cu", "t * TOKENS + TOKENS - 1 > mine", "t * TOKENS + TOKENS - 1 > mine + 16"),
    ("mha.cu", "(k_at ^ k % 4 * 32)", "(k_at ^ k % 2 * 32)"),
    ("mha.cu", "ldsm_x4_t(b, ", "ldsm_x4(b, "),
    ("mha.cu", "o[i][j][2] *= fade[1];", "o[i][j][2] *= fade[0];"),
    ("mha.cu", "l[i][h] = l[i][h] * fade[h] + sum;", "l[i][h] = l[i][h] + sum;"),
    ("mha.cu", "(lane & 3) == 0 ? ml.y : 0.f", "ml.y"),
    ("mha.cu", "first > 0 && at >= 0;", "first > 1000000 && at >= 0;"),
    ("mha.cu", "if (first > 0 && t_beg >= t_end) return;", "if (t_beg >= t_end) return;"),
    ("mha.cu", "sum += weight * ml.y;", "sum += ml.y;"),
    ("mha.cu", "if (t + 1 < t_end) load_k(t + 1);", "if (t + 2 < t_end) load_k(t + 1);"),
    ("expand.cu", "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    ("expand.cu", "load(s + STAGES - 1);", "load(s + STAGES);"),
    ("expand.cu", "const bool is_row = row0 + r < n,", "const bool is_row = true,"),
    ("expand.cu", "of_v % N_V;", "of_v % NOPE;"),
    ("expand.cu", "lane & h ? other - v[i] : v[i] + other", "v[i] + other"),
    ("expand.cu", "gamma[i / 4]", "gamma[0]"),
    ("widen.cu", "- c.m[g][i / 16]", ""),
    ("widen.cu", "e / n_rows % steps", "e % steps"),
    ("route.cu", "other == best && other_at < at", "other == best && other_at > at"),
    ("route.cu", "first + second : first", "first : first"),
    ("quantise.cu", "a = i < k ? from[0] : zero", "a = from[0]"),
    ("narrow.cuh", "v > 65504.f ? 65504.f", "v > 1e30f ? 65504.f"),
    ("splits.cu", "s < n_splits", "s < n_splits - 1"),
    ("gemm.cu", "cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    ("gemm.cu", "copy(s + STAGES - 1, i)", "copy(s + STAGES, i)"),
    ("gemm.cu", "(s + 1) % W_STAGES * W_CHUNKS", "s % W_STAGES * W_CHUNKS"),
    ("gemm.cu", "step / STEPS * BLOCK + 32 * group_at(step % STEPS, g % GROUPS)", "64 * unit + 32 * g"),
    ("gemm.cu", "row * 8 + (c ^ (row & 7))", "row * 8 + c"),
    ("gemm.cu", "scale * byte_to_f32(four, at) - minimum", "scale * byte_to_f32(four, at)"),
    ("gemm.cu", "min(begin + each, n_stages)", "n_stages"),
    ("gemm.cu", "8 * j + e < left", "left > 0"),
    ("matvec.cu", "min(first + tokens_a_block, n_tok)", "min(first + tokens_a_block - 4, n_tok)"),
    ("experts.cu", "weights[slot]", "weights[s]"),
    ("experts.cu", "if (w < warp) at +=", "if (w <= warp) at +="),
    ("experts.cu", "all & ((1u << lane) - 1)", "all & ((2u << lane) - 1)"),
    ("experts.cu", "first_tile = first / tokens + e", "first_tile = first / tokens"),
    ("experts.cu", "min(p + tokens, last)", "min(p + tokens, last + 1)"),
]


def mutants() -> dict[str, tuple[str, str]]:
    """name -> (file, its text)"""
    found = {}
    for file, old, new in CHANGES:
        text = (CUDA / file).read_text(encoding="utf-8")
        assert old in text, f"{file} has no {old!r}"
        found[f"{file}: {old} -> {new}"] = file, text.replace(old, new, 1)
    for file in (
        "mla_decode.cu",
        "mla_decode_wgmma.cu",
        "mla.cuh",
        "hadamard.cuh",
        "mha.cu",
        "expand.cu",
        "gemm.cu",
    ):  # those of reduce.cuh are for whoever uses its memory again
        text = (CUDA / file).read_text(encoding="utf-8")
        for m in re.finditer(r"__syncthreads\(\);", text):
            line = text[: m.start()].count("\n") + 1
            found[f"{file}: no barrier in line {line}"] = file, text[: m.start()] + text[m.end() :]
    return found


def unseen(name: str, file: str, text: str) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        cuda = Path(folder) / "cuda"
        shutil.copytree(CUDA, cuda)
        (cuda / file).write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--import-mode=importlib", "-p", "no:cacheprovider"]
        command += ["-c", os.devnull, f"--rootdir={ROOT}"]
        done = subprocess.run(
            [*command, str(HERE / TESTS[file])], capture_output=True, text=True, check=False,
            env={**os.environ, "KONLY_CUDA": str(cuda), "PYTHONPATH": os.pathsep.join(PATH)}, cwd=ROOT,
        )  # fmt: skip
    why = [line for line in done.stdout.splitlines() if line.startswith("E  ")][:1]
    seen = done.returncode and why  # a mutant may crash after the first failure
    print("caught  " if seen else "NOT SEEN", name, "::", (why or [done.stdout[-200:]])[0][:110], flush=True)
    return None if seen else name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-j", type=int, default=1, help="so many at once")
    parser.add_argument("word", nargs="?", default="")
    options = parser.parse_args()
    chosen = {name: mutant for name, mutant in mutants().items() if options.word in name}
    with ThreadPoolExecutor(options.j) as pool:
        results = list(pool.map(lambda name: unseen(name, *chosen[name]), chosen))
    missed = [name for name in results if name]
    print(f"{len(chosen) - len(missed)} of {len(chosen)} caught")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
