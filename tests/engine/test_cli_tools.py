"""The commands that measure and check, with the real engine: tokenize, perplexity, verify, plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from damage import poke
from synthetic import write_model

from engine import Engine, cli
from engine.commands.plan import Size


def konly(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli.main, arguments, input=stdin)


def told(*arguments: str) -> dict[str, Any]:
    done = konly(*arguments, "--json")
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("Once upon a time, a fox met a quiet rabbit near the river. They went home at last. " * 8)
    return path


def test_tokens_are_shown_one_a_line() -> None:
    done = konly("tokenize", "-p", "Once upon ü")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["0", "'<|bos|>'", "control"]
    assert lines[1].split() == ["470", "'Once'"]
    assert lines[-2].split()[1] == "b'\\xc3'"  # half a character
    assert done.stderr == f"{len(lines)} tokens\n"


def test_ids_are_a_list_that_detokenizes() -> None:
    engine = Engine()
    ids = json.loads(konly("tokenize", "--ids", stdin="a fox\n\nß").stdout)
    assert ids == engine.tokenize("a fox\n\nß")
    assert engine.detokenize(ids) == "a fox\n\nß"


def test_bos_and_control_tokens_are_options() -> None:
    assert json.loads(konly("tokenize", "-p", "<|endoftext|>", "--no-bos", "--parse-special", "--ids").stdout) == [1]
    assert len(told("tokenize", "-p", "<|endoftext|>", "--no-bos")["tokens"]) > 3


def test_tokens_as_json_have_text_and_bytes() -> None:
    result = told("tokenize", "-p", "Once ü", "--no-bos")
    assert result["n_tokens"] == len(result["tokens"])
    assert result["tokens"][0] == {"id": 470, "text": "Once", "control": False, "bytes": b"Once".hex()}
    assert [one["text"] for one in result["tokens"][-2:]] == [None, None]


def test_perplexity_is_printed_with_its_error(text: Path) -> None:
    done = konly("perplexity", "-f", str(text), "-c", "32", "--chunks", "2")
    assert done.exit_code == 0
    assert done.stdout.startswith("perplexity")
    assert "30 tokens: the second halves of 2 × 32" in done.stdout
    assert "±" in done.stdout


def test_kl_against_another_cache_or_file_is_the_same_measure(text: Path) -> None:
    options = ("perplexity", "-f", str(text), "-c", "32", "--chunks", "2", "-ctk", "f16")
    cache = told(*options, "--against-cache-type-k", "q8")
    file = told(*options, "--kl-against", Engine().path, "--against-cache-type-k", "q8")
    assert cache == file
    assert 0 < cache["kl"]["mean"] < 0.1
    assert "KL(other ‖ model), mean" in konly(*options, "--against-cache-type-k", "q8").stdout


def test_a_text_too_short_for_perplexity_is_one_line() -> None:
    done = konly("perplexity", "-p", "short")
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: the text has ") and done.stderr.count("\n") == 1


def test_verify_calls_the_default_model_good() -> None:
    done = konly("verify", "-n", "3", "-p", "Once upon a time")
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1].startswith("good: weights are sane, and over 3 tokens every layer")
    assert told("verify", "-n", "3")["verdict"] == "good"


def test_verify_names_what_is_bad_and_fails(model_file: Path) -> None:
    write_model(model_file, quant="q8_0", q_lora_rank=64)
    poke(model_file, "blk.2.attn_output.weight", 0, np.float16(np.nan).tobytes())
    done = konly("verify", str(model_file))
    assert done.exit_code == 1
    first, last = done.stdout.splitlines()
    assert first.startswith("tensor 'blk.2.attn_output.weight' (Q8_0): weights of 1 of ")
    assert last == "bad file: 1 tensor; download or convert it again"
    assert json.loads(konly("verify", str(model_file), "--json").stdout)["verdict"] == "bad file"


def test_plan_is_a_table_and_says_whether_it_fits() -> None:
    done = konly("plan", "--ram", "8GiB", "-c", "512", "-ctk", "q8", "--no-probe")
    assert done.exit_code == 0
    assert "512 tokens, type_k q8" in done.stdout and "of 8.0 GiB: fits" in done.stdout
    assert "weights, mapped from the file" in done.stdout and "(as trained)" in done.stdout
    done = konly("plan", "--ram", "32M")
    assert (done.exit_code, "of 32.0 MiB: does not fit: " in done.stdout, "none fits" in done.stdout) == (1, True, True)


def test_plan_estimates_times() -> None:
    done = konly("plan", "--ram", "8GiB")
    assert "first token after about" in done.stdout and "each token about" in done.stdout
    result = told("plan", "--ram", "8GiB", "-c", "300")
    assert list(result["times"]["decode_ms"]) == ["0", "150", "299"]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 8 << 30), ("8G", 8 << 30), ("1.5g", 3 << 29), ("8GB", 8 * 10**9), ("512 MiB", 512 << 20), ("1000", 1000),
     ("0", 0), ("3kb", 3000), ("2TiB", 2 << 40), ("12b", 12)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, nbytes: int) -> None:
    assert Size().convert(text, None, None) == nbytes


@pytest.mark.parametrize("text", ["", "many", "8XB", "-1G", "GiB", "8", "1.5"])
def test_other_sizes_are_refused(text: str) -> None:
    done = konly("plan", "--ram", text)
    assert (done.exit_code, "expected a size like 8GiB" in done.stderr) == (2, True)
