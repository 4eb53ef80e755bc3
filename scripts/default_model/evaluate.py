"""How well a file tells stories: evaluate.py FILE.gguf [N]

Through llama.cpp, on N prompts that the grammar makes: is the prompted name used, are there at most two names, does the
story end by itself; are questions about facts, and about a story just told, answered word for word.
"""

from __future__ import annotations

import json
import re
import sys
from random import Random

import gen_corpus
from gen_repeat import NAMES
from llama_cpp import LlamaCpp

TEMPERATURE = 0.6
SEED = 4242
PROMPT = re.compile(r"((?:Write|Tell)[^\n]*named (\w+) who[^\n]*)\n\n")


def tell_stories(peer: LlamaCpp, n: int, r: Random) -> dict[str, float]:
    n_adhere = n_consistent = n_ended = n_told = 0
    while n_told < n:
        match = PROMPT.match(gen_corpus.story(r))
        if not match:
            continue
        text, reason = peer.text(match[1] + "\n\n", 400, TEMPERATURE, seed=n_told)
        n_told += 1
        names = {word for word in re.findall(r"[A-Z]\w+", text.split("\nQuestion:")[0]) if word in NAMES}
        n_adhere += match[2] in names
        n_consistent += len(names) <= 2
        n_ended += reason == "stop"
    return {"prompted_name_used": n_adhere / n, "at_most_two_names": n_consistent / n, "ends_by_itself": n_ended / n}


def answer_facts(peer: LlamaCpp, n: int, r: Random) -> float:
    facts = [gen_corpus.fact(r) for _ in range(n)]
    return sum(_answer(peer, f"Question: {question}\nAnswer:") == answer for question, answer in facts) / n


def answer_about_stories(peer: LlamaCpp, n: int, r: Random) -> float:
    n_right = n_asked = 0
    while n_asked < n:
        head, found, rest = gen_corpus.story(r).partition("\nQuestion:")
        if not found:
            continue
        question, answer = rest.split("\nAnswer:", 1)
        n_asked += 1
        got = _answer(peer, f"{head}\nQuestion:{question}\nAnswer:")
        n_right += got == answer.split("\nQuestion:")[0].strip()
    return n_right / n


def _answer(peer: LlamaCpp, prompt: str) -> str:
    return peer.text(prompt, 30)[0].strip().split("\n")[0]


def main(path: str, n: str = "40") -> None:
    peer, r = LlamaCpp(path), Random(SEED)
    result = tell_stories(peer, int(n), r)
    result["facts_right"] = answer_facts(peer, int(n), r)
    result["questions_about_a_story_right"] = answer_about_stories(peer, int(n), r)
    print(json.dumps({"model": path, "n": int(n), **result}))


if __name__ == "__main__":
    main(*sys.argv[1:])
