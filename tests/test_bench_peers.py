"""The table beside the peers: from a small record to Markdown, between its comments; and a bench that goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))  # last, for it holds a test.py
import bench_peers
import marked
import peer_table
from bench_peers import CONTENDERS, Contender, Result

LIMITS = {"read_gb_s": 42.0, "f32_gmul_s": 240.0, "bf16_gmul_s": 490.0, "int8_gmul_s": 980.0}
CASE = {"cpu": "znver5", "threads": 2, "n_prompt": 512, "n_gen": 16, "depths": "0,1000", "prompt_depths": "0"}


def result(engine: str, flags: str, ms: float, deep: float, rate: float, first: float, **more: Any) -> Result:
    more = {"model": "v2lite.gguf", "round": 0, "others": 0.0} | more
    if engine == "konly":
        more |= {"limits": LIMITS, "machine": "znver5, 2 CPUs, Linux"}
        more["decode_limit_ms"] = {"0": {"read": 38.0, "peak": 3.0}, "1000": {"read": 39.0, "peak": 5.0}}
    else:
        more["version"] = f"{engine}-python 1.2"
    times = {"decode_ms": {"0": ms, "1000": deep}, "prefill_t_s": {"0": rate}, "first_token_s": first}
    return CASE | {"engine": engine, "flags": flags} | times | more


RESULTS = [
    result("konly", "bf16", 40.0, 50.0, 150.0, 0.5),
    result("konly", "bf16", 42.0, 50.0, 150.0, 0.5, round=1, others=0.25),
    result("konly", "bf16", 90.0, 50.0, 150.0, 0.5, round=2),
    result("konly", "q8", 45.0, 48.0, 140.0, 0.6),
    result("konly", "f16", 10.0, 10.0, 999.0, 0.1),
    result("llama.cpp", "no repack", 60.0, 100.0, 60.0, 0.7),
    result("llama.cpp", "repack", 57.0, 110.0, 40.0, 7.2),
    result("ik_llama.cpp", "q8_0 -rtr", 42.0, 60.0, 110.0, 9.5),
    result("konly", "bf16", 2.0, 4.0, 2000.0, 0.2, model="v2lite-attn.gguf"),
]


def test_table_has_the_best_of_each_engine_with_its_flags_and_the_ratios() -> None:
    lines = peer_table.tables(RESULTS).splitlines()
    assert lines[2:7] == [
        "| v2lite: decode at depth 0, ms/token | 42 (bf16) | 57 (repack) | 42 (q8_0 -rtr) | 1.36 × | 1.00 × |",
        "| v2lite: decode at depth 1,000, ms/token | 48 (q8) | 100 (no repack) | 60 (q8_0 -rtr) | 2.08 × | 1.25 × |",
        "| v2lite: 512 prompt tokens at depth 0, t/s | 150 (bf16) | 60 (no repack) | 110 (q8_0 -rtr) |"
        " 2.50 × | 1.36 × |",
        "| file in the page cache to the first token, whole process, s | 0.5 (bf16) | 0.7 (no repack) |"
        " 9.5 (q8_0 -rtr) | 1.40 × | 19.00 × |",
        "| v2lite-attn: decode, µs per cached token | 2 (bf16) |  |  |  |  |",
    ]
    note = lines[-1]
    assert "medians of 3 rounds (v2lite) and 1 round (v2lite-attn)," in note
    assert "medians of 3 rounds," in peer_table.tables(RESULTS[:-1])
    assert "ik_llama.cpp-python 1.2, llama.cpp-python 1.2" in note and "0.25 cores" in note
    assert "DRAM 42.0 GB/s" in note and "f32 240, bf16 490, int8 980" in note


def test_table_is_written_between_its_comments_alone(tmp_path: Path) -> None:
    record, document = tmp_path / "bench.json", tmp_path / "README.md"
    record.write_text(json.dumps(RESULTS))
    document.write_text("# Ä\n<!-- bench_peers -->\nold\n<!-- /bench_peers -->\nafter\n", encoding="utf-8")
    for _ in range(2):  # writing again changes nothing
        done = CliRunner().invoke(bench_peers.main, ["--table", str(record), str(document)])
        assert done.exit_code == 0, done.output
        text = document.read_text(encoding="utf-8")
        assert text == f"# Ä\n<!-- bench_peers -->\n{peer_table.tables(RESULTS)}\n<!-- /bench_peers -->\nafter\n"


@pytest.mark.parametrize("text", ["", "<!-- x -->", "<!-- /x --><!-- x -->", "<!-- x --><!-- x --><!-- /x -->"])
def test_a_document_without_the_comments_is_left_alone(text: str, tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text(text)
    with pytest.raises(ValueError, match="once each"):
        marked.replace(path, "x", "table")
    assert path.read_text() == text


def test_the_readme_has_all_comments_that_scripts_write_between(tmp_path: Path) -> None:
    readme = Path(__file__).resolve().parents[1] / "README.md"
    copy = tmp_path / "README.md"
    copy.write_text(readme.read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("bench_peers", "plot_bench", "bench_k_only", "kl_type_k"):
        marked.replace(copy, name, "x")


def test_a_bench_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    out, measured = tmp_path / "bench.json", []
    stop_at = 4

    def measure(contender: Contender) -> Result:
        measured.append(contender)
        if len(measured) == stop_at:
            raise KeyboardInterrupt
        return {"decode_ms": {"0": 1.0}}

    case = CASE | {"model": "m.gguf"}
    with pytest.raises(KeyboardInterrupt):
        bench_peers.go_on(out, case, CONTENDERS[:3], 2, measure)
    assert [(r["round"], r["flags"]) for r in bench_peers.read(out)] == [(0, c.flags) for c in CONTENDERS[:3]]

    stop_at = 0
    measured.clear()
    bench_peers.go_on(out, case, CONTENDERS[:3], 2, measure)
    assert measured == list(CONTENDERS[:3])  # the second round
    bench_peers.go_on(out, case, CONTENDERS[:3], 2, measure)
    assert len(measured) == 3  # all there
    bench_peers.go_on(out, case | {"threads": 1}, CONTENDERS[:3], 1, measure)
    assert len(measured) == 6  # another case is not the same
    assert len(bench_peers.read(out)) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_limits_of_a_row_are_what_its_parts_could_not_go_below() -> None:
    parts = {
        "dense": {"ms": 10.0, "of_read": 0.5, "of_peak": 0.1},
        "rest": {"ms": 1.0, "of_read": None, "of_peak": None},
    }
    assert bench_peers.limit_ms({"parts": parts}) == {"read": 5.0, "peak": 1.0}


def test_what_a_peer_prints_before_its_json_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peers, "_output", lambda command: '=== repacking\n{"not": this}\n\n{"load_s": 1.5}\n')
    assert bench_peers._json(["peer"]) == {"load_s": 1.5}
    monkeypatch.setattr(bench_peers, "_output", lambda command: '{\n  "model": "m"\n}\n')
    assert bench_peers._json(["konly"]) == {"model": "m"}
