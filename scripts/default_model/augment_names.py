"""Swap names and colours, consistently within each TinyStories document, so that a small corpus goes further.

python augment_names.py IN.txt OUT.txt N_VARIANTS SEED [SKIP_LAST]        the first variant is the text as it is
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from random import Random

from corpus import read_documents, write_documents

GIRLS = """
    Lily Mia Anna Sue Rosie Ella Nora Lucy Zoe Amy Kate Ruby Ivy Clara Molly Daisy Emma Sara Tina Jane Lila Lola Jill
    Mary Sally Ana Kim Eva Bella Lisa Alice Betty Sarah Jenny
""".split()
BOYS = """
    Tom Ben Sam Max Tim Jack Leo Finn Noah Adam Owen Luke Billy Oscar Henry Dan Theo Jake Fred Will Bob Joe John Mark
    Tommy Timmy Jim Peter Mike Bobby Johnny Sammy Jimmy
""".split()
PETS = "Spot Fluffy Buddy Kitty Pip Rex Whiskers Benny Coco Biscuit Dot Rusty Misty".split()
COLOURS = "red blue green yellow purple orange pink white brown".split()
POOLS = (GIRLS, BOYS, PETS, COLOURS)
KEEP_COLOURS = 0.4  # of the documents

WORD = re.compile(r"\b(" + "|".join(sum(POOLS, [])) + r")\b")


def augment(documents: list[str], n_variants: int, r: Random) -> Iterator[str]:
    documents = list(documents)
    for variant in range(n_variants):
        r.shuffle(documents)
        for text in documents:
            swaps = _swaps(text, r) if variant else {}
            yield _mend_articles(WORD.sub(lambda match, swaps=swaps: swaps.get(match[1], match[1]), text))


def _swaps(text: str, r: Random) -> dict[str, str]:
    swaps: dict[str, str] = {}
    for pool in POOLS:
        used = [word for word in pool if re.search(rf"\b{word}\b", text)]
        if not used or (pool is COLOURS and r.random() < KEEP_COLOURS):
            continue
        swaps.update(zip(used, r.sample(pool, len(used))))
    return swaps


def _mend_articles(text: str) -> str:
    text = re.sub(r"\b([Aa])n? (?=orange\b)", r"\1n ", text)
    return re.sub(r"\b([Aa])n (?=(red|blue|green|yellow|purple|pink|white|brown)\b)", r"\1 ", text)


def main(source: str, out: str, n_variants: str, seed: str, skip_last: str = "0") -> None:
    documents = read_documents(source)
    documents = documents[: len(documents) - int(skip_last)]
    write_documents(out, augment(documents, int(n_variants), Random(int(seed))))


if __name__ == "__main__":
    main(*sys.argv[1:])
