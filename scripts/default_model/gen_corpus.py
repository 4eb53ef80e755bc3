"""Stories from our own grammar, coherent by construction: python gen_corpus.py OUT.txt N_DOCUMENTS SEED

Each story has a hero, a friend, a parent, a place and an object, which stay the same throughout. Many carry a header
("Write a story about …"), some end with questions and answers about the story; six in a hundred documents are questions
about facts instead. The same seed gives the same text: the order of the draws is part of the recipe.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import grammar as g
from corpus import write_documents


class Story(NamedTuple):
    """A plot of stories.toml."""

    title: str
    prompt: str
    morals: list[str]
    beats: list[list[str]]  # alternatives of each beat
    questions: list[tuple[str, str]]


def read_stories(path: Path) -> list[Story]:
    with open(path, "rb") as file:
        tables = tomllib.load(file)["stories"]
    return [
        Story(t["title"], t["prompt"], t["morals"], [beat.strip().split("\n") for beat in t["beats"]], t["questions"])
        for t in tables
    ]


STORIES = read_stories(Path(__file__).with_name("stories.toml"))


class Person(NamedTuple):
    name: str
    description: str  # "a brave rabbit"
    he: str
    him: str
    his: str


def story(r: Random) -> str:
    """One document: [header] story [questions and answers]."""
    plot = r.choice(STORIES)
    hero = _person(r)
    friend = _person(r, avoid=(hero.name,))
    slots = _slots(r, hero, friend, plot)

    def fill(text: str) -> str:
        return _fill(r, text, slots)

    text = fill(r.choice(g.OPENINGS))
    if "New Friend" not in plot.title and "Hungry" not in plot.title:
        text += " " + fill(r.choice(g.FRIENDS))
    first, *others = [fill(r.choice(alternatives)) for alternatives in plot.beats]
    text += (" " if r.random() < 0.5 else "\n\n") + first
    for beat in others:
        text += (" " if r.random() < 0.3 else "\n\n") + beat
    text += "\n\n" + fill(r.choice(g.ENDINGS))
    if r.random() < 0.45:
        text += r.choice((" The end.", "\n\nThe end."))
    header = r.random()
    if header < 0.35:
        ask = ("Write a story about ", "Write a story about ", "Tell me a story about ", "Write a short story about ")
        start = r.choice(ask)
        text = start + choose(r, f"{hero.description} named {hero.name} {fill(plot.prompt)}.") + "\n\n" + text
    elif header < 0.55:
        text = f"Title: {fill(plot.title)}\n\n{text}"
    if r.random() < 0.35:
        asked = r.sample(plot.questions, r.randint(1, min(2, len(plot.questions))))
        text += "\n" + "".join(f"\nQuestion: {fill(question)}\nAnswer: {fill(answer)}" for question, answer in asked)
    return text


def fact(r: Random) -> tuple[str, str]:
    """(question, answer) about the world."""

    def pick(table: Mapping[str, str]) -> str:
        return r.choice(sorted(table))

    kind = r.randrange(9)
    if kind == 0:
        x = pick(g.SOUNDS)
        return "What does an owl say?" if x == "owl" else f"What does a {x} say?", f"{cap(art(x))} says {g.SOUNDS[x]}."
    if kind == 1:
        x = pick(g.THING_COLOURS)
        return f"What color is the {x}?", f"The {x} is {g.THING_COLOURS[x]}."
    if kind == 2:
        x = pick(g.OPPOSITES)
        y = g.OPPOSITES[x]
        if r.random() < 0.5:
            x, y = y, x
        return f"What is the opposite of {x}?", f"The opposite of {x} is {y}."
    if kind == 3:
        x = pick(g.HOMES)
        return f"Where does {art(x)} live?", f"{cap(art(x))} lives in {g.HOMES[x]}."
    if kind == 4:
        x = pick(g.MEALS)
        return f"What does {art(x)} like to eat?", f"{cap(art(x))} likes to eat {g.MEALS[x]}."
    if kind == 5:
        x = pick(g.MOTHERS)
        return f"Who is the mother of {art(x)}?", f"The mother of {art(x)} is {art(g.MOTHERS[x])}."
    if kind == 6:
        i, j = r.randint(1, 5), r.randint(1, 5)
        return (
            f"What is {g.NUMBERS[i]} plus {g.NUMBERS[j]}?",
            f"{cap(g.NUMBERS[i])} plus {g.NUMBERS[j]} is {g.NUMBERS[i + j]}.",
        )
    if kind == 7:
        i = r.randrange(1, 10)
        return f"Which number comes after {g.NUMBERS[i]}?", f"After {g.NUMBERS[i]} comes {g.NUMBERS[i + 1]}."
    i = r.randrange(7)
    return f"Which day comes after {g.DAYS[i]}?", f"After {g.DAYS[i]} comes {g.DAYS[(i + 1) % 7]}."


def choose(r: Random, text: str) -> str:
    """The text with each `[a|b|c]` replaced by one of them, inner ones first."""
    innermost = re.compile(r"\[([^\[\]]*)\]")
    while match := innermost.search(text):
        text = text[: match.start()] + r.choice(match[1].split("|")) + text[match.end() :]
    return text


def cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def cap_words(text: str) -> str:
    return " ".join(map(cap, text.split()))


def art(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def _person(r: Random, avoid: Collection[str] = ()) -> Person:
    kind = "animal" if r.random() < 0.45 else r.choice(("girl", "boy"))
    species = r.choice(g.ANIMALS)
    female = r.choice("mf") == "f" if kind == "animal" else kind == "girl"
    pool: Sequence[str] = g.PETS if kind == "animal" else (g.GIRLS if female else g.BOYS)
    name = r.choice([name for name in pool if name not in avoid])
    description = art(f"{r.choice(g.ADJECTIVES)} {species if kind == 'animal' else kind}")
    return Person(name, description, *(("she", "her", "her") if female else ("he", "him", "his")))


def _slots(r: Random, hero: Person, friend: Person, plot: Story) -> dict[str, str]:
    parent = r.choice(("mom", "dad", "grandma", "grandpa"))
    colour, toy = r.choice(g.COLOURS), r.choice(g.TOYS).replace("_", " ")
    skill, fear, trap = r.choice(g.SKILLS), r.choice(g.FEARS), r.choice(g.TRAPS)
    building, seed = r.choice(g.BUILDINGS), r.choice(g.SEEDS)
    looked, places = r.sample(g.LOOKED, 2), r.sample(g.PLACES, 2)
    baby, food, fruits = r.choice(g.BABIES), r.choice(g.FOODS), r.sample(g.FRUITS, 2)
    hide, instrument = r.choice(g.HIDEOUTS), r.choice(g.INSTRUMENTS)
    ingredient, present, moral = r.choice(g.INGREDIENTS), r.choice(g.PRESENTS), r.choice(plot.morals)
    his_parent = f"{hero.his} {parent}"
    return {
        "H": hero.name, "hdesc": hero.description, "he": hero.he, "him": hero.him, "his": hero.his,
        "He": cap(hero.he), "His": cap(hero.his), "his_C": cap(hero.his),
        "F": friend.name, "fdesc": friend.description, "fhe": friend.he, "fhim": friend.him, "fhis": friend.his,
        "FHE": cap(friend.he),
        "P": his_parent, "P_C": cap(his_parent), "pw": parent, "pcap": cap(parent),
        "phis": "her" if parent in ("mom", "grandma") else "his",
        "col": colour, "acol": art(colour), "o": toy, "o_a": art(f"{colour} {toy}"), "O_C": cap_words(toy),
        "place": places[0], "place2": places[1], "village": "village",
        "look": looked[0], "look2": looked[1], "hide": hide,
        "skill": skill[0], "skill_C": cap_words(skill[0]), "skilling": skill[1], "skillp": skill[2],
        "fear": fear[0], "fearthing": fear[1], "fearthing_C": cap(fear[1]), "fearend": fear[2],
        "baby": baby, "baby_C": cap(baby), "mother": g.MOTHERS[baby], "stuck": trap[0], "stuckt": trap[1],
        "build": building[0], "build_C": cap_words(building[0]), "buildm": building[1],
        "buildp": building[2][0].lower() + building[2][1:],
        "instr": instrument, "instr_C": cap(instrument),
        "seed": seed[0], "seed_C": cap_words(seed[0]), "seedend": seed[1],
        "food": food, "food_C": " ".join(map(cap, food.split()[1:])), "fruit": fruits[0], "fruit2": fruits[1],
        "ing": ingredient, "pres": present, "moral": moral,
    }  # fmt: skip


def _fill(r: Random, text: str, slots: Mapping[str, str]) -> str:
    for name, phrase in (("{HAPPY}", g.HAPPY), ("{SAD}", g.SAD), ("{DAY}", g.DAY)):
        while name in text:
            chosen = choose(r, phrase).format(**slots)
            before = text[: text.index(name)]
            starts_sentence = not before or before.rstrip()[-1:] in '.!?"\n'
            text = text.replace(name, cap(chosen) if starts_sentence else chosen, 1)
    for _ in range(3):  # what fills a slot may have slots
        text = text.format(**slots)
    return choose(r, text)


def _documents(n: int, r: Random) -> Iterator[str]:
    for _ in range(n):
        if r.random() < 0.06:
            text = "\n".join("Question: {}\nAnswer: {}".format(*fact(r)) for _ in range(r.randint(2, 6)))
        else:
            text = story(r)
        yield re.sub(r"\b([Aa]) (?=(owl|apple|orange)|old\b)", r"\1n ", text)


def main(arguments: Sequence[Any]) -> None:
    out, n, seed = arguments
    write_documents(out, _documents(int(n), Random(int(seed))))


if __name__ == "__main__":
    main(sys.argv[1:])
