"""The command in a process of its own, with the real engine: what a user sees, Ctrl-C, closed pipes, kept kernels."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from synthetic import write_model

from cpu_kernels.isa import ISA
from engine import Engine
from engine.engine import default_model

COMMAND = [sys.executable, "-P", "-c", "from engine.cli import main; main(prog_name='konly')"]
SUMMARY = re.compile(
    r"prompt (\S+) tokens, \S+ t/s \| generated (\S+) tokens, \S+ t/s \| K-cache \S+ [KMG]?i?B \(\w+\)"
)


def konly(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )


def start(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A model that hardly ever ends a text by itself, its kernels compiled."""
    path = write_model(tmp_path_factory.mktemp("cli") / "endless.gguf", q_lora_rank=64)
    list(Engine(path).generate("x", max_tokens=2))
    yield str(path)


@pytest.mark.parametrize("how", ["-p", "stdin"])
def test_the_default_model_tells_a_story(how: str) -> None:
    prompt = "Once upon a time"
    expected = prompt + "".join(Engine().generate(prompt, max_tokens=20, temperature=0)) + "\n"
    options = ("-n", "20", "--temp", "0")
    done = konly("run", *options, "-p", prompt) if how == "-p" else konly("run", *options, stdin=prompt + "\n")
    assert done.stdout == expected
    assert done.stderr.count("\n") == 1 and SUMMARY.fullmatch(done.stderr.strip())
    assert done.returncode == 0


def test_the_first_start_compiles_what_the_file_needs_and_the_second_nothing(tmp_path: Path) -> None:
    arguments = ("run", "-p", "Once upon a time", "-n", "5", "--temp", "0", "-ctk", "f16")
    first = konly(*arguments, KONLY_CACHE_DIR=str(tmp_path))
    compiling, compiled, summary = first.stderr.splitlines()
    assert re.fullmatch(r"compiling \d+ kernels for this machine …", compiling)
    assert re.fullmatch(r"compiled \d+ kernels for this machine in \S+ s", compiled)
    assert SUMMARY.fullmatch(summary)
    kept = [path.name for path in tmp_path.rglob("*.o")]
    types = {int(n) for name in kept for n in re.findall(r"type_id=(\d+)", name)}
    assert types <= {0, 8}  # the file's: F32 and Q8_0
    assert not any("bf16" in name or "q8" in name for name in kept if "type_k" in name)  # f16 was asked for

    second = konly(*arguments, KONLY_CACHE_DIR=str(tmp_path))
    assert second.stdout == first.stdout
    assert SUMMARY.fullmatch(second.stderr.strip())
    assert sorted(path.name for path in tmp_path.rglob("*.o")) == sorted(kept)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_stops_the_text_and_sums_up(endless: str) -> None:
    process = start("run", endless, "-p", "x", "-c", "1000000", "-n", "-1")
    assert process.stdout is not None
    process.stdout.read(8)  # it is generating
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert SUMMARY.fullmatch(stderr.decode().splitlines()[-1])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no broken pipes of this kind")
def test_a_reader_that_has_seen_enough_ends_it_without_a_word(endless: str) -> None:
    process = start("run", endless, "-p", "x", "-c", "1000000", "--top-k", "1")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(8)
    process.stdout.close()
    stderr = process.stderr.read().decode()
    assert process.wait(timeout=30) == 1
    assert not [line for line in stderr.splitlines() if not line.startswith("Note: ")]
    process.stderr.close()


def test_a_file_that_is_cut_off_is_one_line(tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(Path(default_model()).read_bytes()[:5_000_000])
    for command in (("run", "-p", "x"), ("inspect",), ("bench",)):
        done = konly(command[0], str(cut), *command[1:])
        assert done.returncode == 1 and done.stdout == ""
        assert re.fullmatch(r"Error: .*cut\.gguf: tensor .*: the file is cut off; download it again\n", done.stderr)


def test_a_prompt_that_does_not_fit_is_one_line() -> None:
    done = konly("run", "-c", "10", stdin="a long story " * 10)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(
        r"Error: prompt of \d+ tokens does not fit n_ctx=10; raise n_ctx \(--ctx-size\) or shorten it\n", done.stderr
    )


def test_bench_prints_its_figures_as_json() -> None:
    done = konly(*"bench -p 16,40 -n 3 -d 0,300 -t 1 --json".split())
    told = json.loads(done.stdout)
    assert set(told) == {"model", "backend", "limits", "decode", "prefill"}
    assert told["model"] == "tiny-mla-tales-Q8_0.gguf"
    assert set(told["limits"]) == {"1"}
    assert [(row["type_k"], row["threads"], row["depth"]) for row in told["decode"]] == [("q8", 1, 0), ("q8", 1, 300)]
    assert [(row["depth"], row["tokens"]) for row in told["prefill"]] == [(0, 16), (0, 40), (300, 16), (300, 40)]


def test_inspect_tells_the_form_of_a_legacy_file(tmp_path: Path) -> None:
    path = write_model(tmp_path / "legacy.gguf", form="legacy", q_lora_rank=64)
    done = konly("inspect", str(path))
    assert done.returncode == 0
    assert "legacy: attn_kv_b" in done.stdout and "here it runs K-only" in done.stdout


@pytest.mark.parametrize("features", [{}, {"NUMBA_CPU_FEATURES": "+sse2,+avx"}])
def test_a_cpu_without_f16c_is_refused_in_a_sentence(features: dict[str, str]) -> None:
    if not ISA.x86:
        pytest.skip("about x86")
    done = konly("run", "-p", "x", "-n", "1", NUMBA_CPU_NAME="generic", **features)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: the CPU (generic) has no F16C instructions")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="of a POSIX shell")
def test_a_closed_standard_error_does_not_matter() -> None:
    program = ["/bin/sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, "run", "-p", "Once", "-n", "3", "--temp", "0"]
    done = subprocess.run(program, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=120)
    assert (done.returncode, done.stdout) == (0, b"Once upon a time\n")
