"""llama-cpp-python's `Llama` over konly, for programs that were written for it: LangChain and LlamaIndex among them.

    from engine.compat import Llama                     llm = Llama("model.gguf", n_ctx=4096)
    llm("Once upon a time", max_tokens=32)["choices"][0]["text"]

    import engine.compat
    engine.compat.install()                             from now on, `import llama_cpp` is this module
    from langchain_community.llms import LlamaCpp

    llama.py       Llama: the model, its tokens, its state        completion.py  create_completion, OpenAI's objects
    options.py     what the constructor takes and refuses         chat.py        create_chat_completion
    grammar.py     LlamaGrammar

What differs from llama-cpp-python: one K-cache and no V-cache, so type_v means nothing; logprobs need no logits_all;
calls from several threads get a cache each; the chat template is the file's own, and what users write in a chat never
becomes a control token; the file's RoPE is not overridden (LangChain sends 10000 and 1 for every model); there are no
embeddings and no LoRA. Errors are ValueError and EngineError at once.

Source: the public interface of llama-cpp-python 0.3 (llama.py, llama_grammar.py), and what langchain-community 0.4
(llms/llamacpp.py, chat_models/llamacpp.py) and llama-index-llms-llama-cpp call of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .grammar import LlamaGrammar as LlamaGrammar
from .llama import Llama as Llama
from .llama import LlamaState as LlamaState
from .options import GGML_TYPE_BF16 as GGML_TYPE_BF16
from .options import GGML_TYPE_F16 as GGML_TYPE_F16
from .options import GGML_TYPE_Q8_0 as GGML_TYPE_Q8_0
from .options import LLAMA_DEFAULT_SEED as LLAMA_DEFAULT_SEED
from .options import LlamaError as LlamaError

__all__ = [
    "GGML_TYPE_BF16", "GGML_TYPE_F16", "GGML_TYPE_Q8_0", "LLAMA_DEFAULT_SEED", "Llama", "LlamaError", "LlamaGrammar",
    "LlamaState", "LogitsProcessorList", "StoppingCriteriaList", "install",
]  # fmt: skip


class LogitsProcessorList(list[Callable[..., Any]]):
    """Callables (ids so far, logits) -> logits, one after another."""

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class StoppingCriteriaList(list[Callable[..., bool]]):
    """Callables (ids so far, logits) -> whether to end."""

    def __call__(self, input_ids: Any, logits: Any) -> bool:
        return any(criterion(input_ids, logits) for criterion in self)


def install() -> ModuleType:
    """Make `import llama_cpp` give this; the module. RuntimeError if the real one has been imported before."""
    here = sys.modules[__name__]
    present = sys.modules.get("llama_cpp")
    if present is not None:
        if getattr(present, "Llama", None) is not Llama:
            raise RuntimeError("llama_cpp has been imported already; call engine.compat.install() before that")
        return present
    module = ModuleType("llama_cpp", here.__doc__)
    module.__spec__ = ModuleSpec("llama_cpp", None, origin=here.__file__)  # for importlib.util.find_spec
    for name in __all__:
        setattr(module, name, getattr(here, name))
    sys.modules["llama_cpp"] = module
    return module
