"""What `konly inspect` tells, for files of every form, and for those it cannot run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gguf_bytes import RawTensor, gguf_bytes, key
from synthetic import TOY, write_model

from engine import cli, memory
from engine.describe import describe
from engine.engine import default_model
from engine.tensor import GGML_TYPES


def test_default_model() -> None:
    told = describe(default_model())
    assert told["name"] == "tiny-mla-tales"
    assert (told["n_params"], told["n_params_active"]) == (11_243_552, 5_476_384)
    assert told["form"] == "modern"
    assert set(told["tensor_types"]) == {"Q8_0", "F32"}
    assert told["k_cache"]["f16"]["bytes_per_token"] == 5 * (128 + 32) * 2
    assert told["k_cache"]["f16"]["n_ctx_fits"] == 1024
    assert told["problems"] == []


@pytest.mark.parametrize("form", ["modern", "2d", "legacy"])
def test_form_is_told_and_does_not_change_the_cache(tmp_path: Path, form: str) -> None:
    told = describe(write_model(tmp_path / "toy.gguf", form=form))
    assert told["form"] == form
    assert ("K-only" in told["form_note"]) == (form != "modern")
    assert told["k_cache"]["f16"]["bytes_per_token"] == TOY.n_layer * (TOY.kv_lora_rank + TOY.n_rot) * 2
    assert told["n_params"] == describe(write_model(tmp_path / "modern.gguf"))["n_params"]


def test_mtp_blocks_count_for_nothing(tmp_path: Path) -> None:
    without = describe(write_model(tmp_path / "without.gguf"))
    told = describe(write_model(tmp_path / "with.gguf", n_layer_nextn=1))
    assert told["mtp_nbytes"] > 0
    assert told["hparams"]["n_layer_nextn"] == 1
    assert told["n_params"] == without["n_params"]
    assert told["n_params_active"] == without["n_params_active"]
    assert told["k_cache"]["q8"]["bytes_per_token"] == without["k_cache"]["q8"]["bytes_per_token"]


def test_tied_output_is_active(tmp_path: Path) -> None:
    untied = describe(write_model(tmp_path / "untied.gguf"))
    tied = describe(write_model(tmp_path / "tied.gguf", tied=True))
    assert tied["n_params_active"] == untied["n_params_active"]
    assert tied["n_params"] < untied["n_params"]


def test_context_is_fitted_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "toy.gguf", n_ctx_train=1 << 20)
    room = 100 << 20
    monkeypatch.setattr(memory, "available", lambda: (256 << 20) + os.path.getsize(path) + room)
    cache = describe(path)["k_cache"]["bf16"]
    assert cache["n_ctx_fits"] == room // cache["bytes_per_token"]
    monkeypatch.setattr(memory, "available", lambda: 1 << 20)
    assert describe(path)["k_cache"]["bf16"]["n_ctx_fits"] == 0
    monkeypatch.setattr(memory, "available", lambda: None)
    assert describe(path)["k_cache"]["bf16"]["n_ctx_fits"] is None


def test_other_architecture_is_described_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    keys = [key("general.architecture", "lla\x1bma"), key("general.name", "x\x1b[2Jy")]
    path.write_bytes(gguf_bytes(keys, [RawTensor("w", (4, 2), data=bytes(32))]))
    told = describe(path)
    assert told["n_params"] == 8
    assert told["tensor_types"] == {"F32": {"count": 1, "nbytes": 32, "runs": True}}
    assert "k_cache" not in told
    (problem,) = told["problems"]
    assert problem.startswith("architecture 'lla\\x1bma' is not supported")
    shown = inspect(path)
    assert "\x1b" not in shown
    assert "x\\x1b[2Jy" in shown
    assert "cannot run: architecture" in shown


def test_tensors_without_kernel_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(GGML_TYPES, 8)
    told = describe(default_model())
    assert not told["tensor_types"]["Q8_0"]["runs"]
    assert (
        "tensor 'blk.1.ffn_down_exps.weight' has type Q8_0, which has no CPU kernel; requantise to Q4_K"
        in told["problems"]
    )
    assert "no kernel" in inspect(default_model())


def test_damaged_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGML" + bytes(100))
    done = CliRunner().invoke(cli.main, ["inspect", str(tmp_path / "bad.gguf")])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"Error: {tmp_path / 'bad.gguf'}: ")
    assert done.stderr.count("\n") == 1


def inspect(path: str | Path, *options: str) -> str:
    done = CliRunner().invoke(cli.main, ["inspect", str(path), *options])
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


def test_tables_tell_the_story() -> None:
    shown = inspect(default_model())
    for line in (
        "K-cache row      128 latent + 32 rope, in each layer; no V",
        "sigmoid routing",
        "11,243,552, 5,476,384",
    ):
        assert line in shown


def test_json_is_the_description() -> None:
    told = json.loads(inspect(default_model(), "--json"))
    expected: dict[str, Any] = describe(default_model())
    for changing in ("memory_available",):
        assert told.pop(changing) == pytest.approx(expected.pop(changing), rel=0.5)
    assert told == expected
