"""The copy curriculum: marked repetitions, which make induction heads form early, and who has what.

python gen_repeat.py STORIES.txt OUT.txt N SEED
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from random import Random

import grammar as g
from corpus import read_documents, write_documents
from gen_corpus import art

NAMES = g.GIRLS + g.BOYS + g.PETS


def repeats(stories: list[str], n: int, r: Random) -> Iterator[str]:
    """n documents "Repeat: … Again: …", some followed by one of bindings."""
    for _ in range(n):
        kind = r.random()
        if kind < 0.55:
            sentences = re.split(r'(?<=[.!?"])\s+', r.choice(stories).split("\nQuestion:")[0])
            start = r.randrange(len(sentences))
            text = " ".join(sentences[start : start + r.randint(1, 4)])
        elif kind < 0.8:
            text = ", ".join(r.choice(NAMES) for _ in range(r.randint(3, 12))) + "."
        else:
            text = ", ".join(_has(r) for _ in range(r.randint(2, 6))) + "."
        yield f"Repeat: {text}\n" + "\n".join([f"Again: {text}"] * r.randint(1, 2))
        if kind > 0.8 and r.random() < 0.7:
            yield _bindings(r)


def _has(r: Random) -> str:
    return f"{r.choice(NAMES)} has {r.choice(('a', 'the', 'one'))} {r.choice(g.COLOURS)} {_toy(r)}"


def _toy(r: Random) -> str:
    return r.choice(g.TOYS).replace("_", " ")


def _bindings(r: Random) -> str:
    owners = r.sample(NAMES, r.randint(2, 6))
    things = [art(f"{r.choice(g.COLOURS)} {_toy(r)}") for _ in owners]
    told = " ".join(f"{owner} has {thing}." for owner, thing in zip(owners, things))
    asked = r.sample(range(len(owners)), min(3, len(owners)))
    return told + "".join(
        f"\nQuestion: What does {owners[i]} have?\nAnswer: {owners[i]} has {things[i]}." for i in asked
    )


def main(stories: str, out: str, n: str, seed: str) -> None:
    write_documents(out, repeats(read_documents(stories), int(n), Random(int(seed))))


if __name__ == "__main__":
    main(*sys.argv[1:])
