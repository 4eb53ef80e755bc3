"""Compare exported files with the checkpoint: verify_gguf.py LAST.pt TOKENIZER.json FILE.gguf…

Log-probabilities of the next token, llama.cpp against torch in f32, at ten positions; and how many tokens a text has.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from build_tokenizer import BOS_ID
from llama_cpp import LlamaCpp
from model import Config, Model
from tokenizers import Tokenizer

TEXTS = [
    "Once upon a time, there was a",
    "Write a story about a brave rabbit named Pip who lost a red kite.\n\nOnce upon a time,",
    'One day, Lily went to the park with her mom. She saw a big dog. "Can I pet it?" asked Lily. Her mom said, '
    '"Yes, but be',
    "Question: What did Tom lose?\nAnswer: Tom lost a",
    "It's 123 o'clock!  Hello   world\n\n\nThe",
]
PROMPTS = [
    "Once upon a time,",
    "Write a story about a brave rabbit named Pip who lost a red kite.\n\n",
    "Title: The Broken Drum\n\n",
]
IGNORED_BELOW = -18.0  # log-probability


@torch.no_grad()
def expected(checkpoint: str, tokenizer: Tokenizer) -> dict[tuple[int, ...], np.ndarray]:
    """Token ids -> log-probabilities of the next token, by torch: each text, and two thirds of it."""
    state = torch.load(checkpoint, weights_only=False, map_location="cpu")
    model = Model(Config(**state["config"]))
    model.load_state_dict(state["model"])
    model.eval()
    found = {}
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        for n in (len(ids), len(ids) * 2 // 3):
            prompt = (BOS_ID, *ids[:n])
            found[prompt] = model(torch.tensor([prompt]))[0, -1].float().log_softmax(-1).numpy()
    return found


def verify(path: str, tokenizer: Tokenizer, reference: dict[tuple[int, ...], np.ndarray]) -> None:
    peer = LlamaCpp(path)
    differences, n_agree = [], 0
    for ids, log_p in reference.items():
        n_vocab = len(log_p)
        answer = peer.complete(list(ids), 1, logprobs=n_vocab, n_probs=n_vocab, cache_prompt=False)
        got = np.full(n_vocab, np.nan)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            got[entry["id"]] = entry["logprob"]
        compared = ~np.isnan(got) & (log_p > IGNORED_BELOW)
        differences.append(np.abs(got[compared] - log_p[compared]).max())
        n_agree += int(np.nanargmax(got) == log_p.argmax())
    n_same = sum(
        peer.complete(text, 1, cache_prompt=False)["usage"]["prompt_tokens"] == 1 + len(tokenizer.encode(text).ids)
        for text in TEXTS
    )
    print(
        f"{path}: log-probabilities differ by at most {max(differences):.5f} (mean over positions "
        f"{np.mean(differences):.5f}), most probable token equal at {n_agree} of {len(reference)}, number of tokens "
        f"equal for {n_same} of {len(TEXTS)} texts"
    )
    for prompt in PROMPTS:
        print(f"--- {prompt!r}\n{peer.text(prompt, 260, 0.6, seed=1)[0]}")


def main(checkpoint: str, tokenizer_path: str, *paths: str) -> None:
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(tokenizer_path)
    reference = expected(checkpoint, tokenizer)
    for path in paths:
        verify(path, tokenizer, reference)


if __name__ == "__main__":
    main(*sys.argv[1:])
