"""What Llama's constructor takes, warns of, and refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from engine import BackendError, EngineError, backend
from engine.compat import GGML_TYPE_BF16, GGML_TYPE_F16, GGML_TYPE_Q8_0, Llama
from engine.engine import default_model

LANGCHAIN = {  # what LangChain's classes send for every model
    "rope_freq_scale": 1.0, "rope_freq_base": 10000.0, "lora_path": None, "lora_base": None, "n_ctx": 512,
    "n_parts": -1, "seed": -1, "f16_kv": True, "logits_all": False, "vocab_only": False, "use_mlock": False,
    "n_threads": None, "n_batch": 8, "use_mmap": True, "last_n_tokens_size": 64, "verbose": True,
}  # fmt: skip


def opened(**arguments: Any) -> Llama:
    llama = Llama(default_model(), **{"n_ctx": 64, "verbose": False} | arguments)
    llama.close()
    return llama


def test_the_defaults_and_those_of_langchain_raise_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened()
        opened(**LANGCHAIN)


@pytest.mark.parametrize(
    ("type_k", "name"),
    [(None, "f16"), (GGML_TYPE_F16, "f16"), (GGML_TYPE_BF16, "bf16"), (GGML_TYPE_Q8_0, "q8"), ("q8", "q8")],
)
def test_type_k_is_a_number_of_ggml_or_a_name(type_k: Any, name: str) -> None:
    assert opened(type_k=type_k, type_v=type_k)._stream.type_k == name


def test_n_ctx_0_is_the_models_own() -> None:
    llama = opened(n_ctx=0)
    assert llama.n_ctx() == llama.context_params.n_ctx == 1024


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"use_mlock": True}, "use_mlock=True has no effect"),
        ({"a_new_one": 1}, "the argument a_new_one is not known to konly"),
    ],
)
def test_what_cannot_change_results_is_taken_with_a_warning(arguments: dict[str, Any], match: str) -> None:
    with pytest.warns(UserWarning, match=match):
        opened(**arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"type_k": 2}, r"type_k is 2; expected GGML_TYPE_F16 \(1\)"),
        ({"type_v": 8}, "there is no V-cache"),
        ({"lora_path": "a.gguf"}, "lora_path='a.gguf' cannot be had here"),
        ({"kv_overrides": {"a": 1}}, "kv_overrides"),
        ({"embedding": True}, "embedding=True cannot be had here"),
        ({"vocab_only": True}, "vocab_only"),
        ({"rope_freq_base": 1e6}, "rope_freq_base=1000000.0, but the file's is 10000"),
        ({"rope_freq_scale": 0.5}, "rope_freq_scale=0.5, but the file's is 1"),
        ({"rope_scaling_type": 2}, "rope_scaling_type"),
        ({"chat_format": "llama-2"}, "chat_format 'llama-2' is not known"),
        ({"n_ctx": -1}, "n_ctx"),
        ({"n_gpu_layers": "all"}, "n_gpu_layers is 'all'; expected 0 for the CPU, or -1 for a card"),
        ({"n_threads": 0.5}, "n_threads"),
    ],
)
def test_what_would_change_results_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        opened(**arguments)
    assert isinstance(caught.value, EngineError)


@pytest.mark.parametrize("n_gpu_layers", [-1, 20])
def test_layers_on_a_card_are_all_there_or_refused_in_a_sentence(
    n_gpu_layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_card() -> None:
        raise BackendError("backend 'gpu' asked for, but there is none; or use --backend cpu")

    monkeypatch.setattr(backend, "gpu", no_card)
    with pytest.raises(ValueError, match=r"^backend 'gpu' asked for, .* --backend cpu \(n_gpu_layers=0\)$"):
        opened(n_gpu_layers=n_gpu_layers)


@pytest.mark.parametrize("n_gpu_layers", [0, None])
def test_without_layers_on_a_card_it_is_the_cpu(n_gpu_layers: int | None) -> None:
    assert opened(n_gpu_layers=n_gpu_layers).engine.backend == "cpu"


def test_a_missing_file_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        Llama(str(tmp_path / "none.gguf"))


def test_a_second_close_does_nothing_and_a_closed_one_is_refused() -> None:
    llama = opened()
    llama.close()
    with pytest.raises(ValueError, match="closed"):
        llama("Once", max_tokens=1)
