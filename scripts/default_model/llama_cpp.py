"""llama.cpp through xllamacpp: completions of a GGUF file, for the scripts that check and judge the model."""

from __future__ import annotations

import json
from typing import Any

import xllamacpp


class LlamaCpp:
    def __init__(self, path: str, n_ctx: int = 1024) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx = n_ctx
        params.n_parallel = 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.warmup = False
        params.verbosity = 0
        self._server = xllamacpp.Server(params)

    def complete(self, prompt: str | list[int], n: int, temperature: float = 0.0, **options: Any) -> dict[str, Any]:
        """The server's answer, as its HTTP API gives it."""
        request = {
            "prompt": prompt,
            "n_predict": n,
            "max_tokens": n,
            "temperature": temperature,
            "top_k": 40,
            **options,
        }
        answer = self._server.handle_completions(request)
        return answer if isinstance(answer, dict) else json.loads(answer)

    def text(self, prompt: str, n: int, temperature: float = 0.0, seed: int = 0) -> tuple[str, str]:
        """(text, why it ended)"""
        choice = self.complete(prompt, n, temperature, seed=seed)["choices"][0]
        return choice["text"], choice["finish_reason"]
