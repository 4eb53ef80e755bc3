"""Bring excerpts of TinyStories (CDLA-Sharing-1.0) into documents, one for each story, in ASCII.

python clean_tinystories.py OUT.txt EXCERPTS.txt…        see README.md for where the data is from; this step is optional
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

from corpus import write_documents

QUOTES = str.maketrans({"\r": "", "“": '"', "”": '"', "’": "'", "‘": "'", "—": " - ", "–": "-", "…": "..."})
OPENING = re.compile(
    r"^(Once upon a time|One day|Once there was|Once,"
    r"|One (sunny|hot|cold|rainy|nice|bright|beautiful|morning|night|summer)|There was once|In a |Long ago"
    r"|A long time ago|Lily and |Tom and |Ben and |Anna and |Sara and |Tim and |Mia and |Jack and |Sam and )"
)
SURE_OPENINGS = ("Once", "One day", "There was once", "Long ago", "A long")
MIN_BEFORE_OPENING, MIN_BEFORE_ONE_DAY = 350, 500  # characters: "One day" also begins a second paragraph
MIN_STORY, MAX_STORY = 150, 9000  # characters, exclusive


def split_stories(text: str) -> Iterator[str]:
    """Stories are told apart by how they begin."""
    story: list[str] = []
    for paragraph in filter(None, map(str.strip, re.split(r"\n+", text.translate(QUOTES)))):
        length = sum(map(len, story))
        opens = OPENING.match(paragraph) and (
            not story or (length > MIN_BEFORE_OPENING and paragraph.startswith(SURE_OPENINGS))
        )
        if opens and not (story and paragraph.startswith("One day") and length < MIN_BEFORE_ONE_DAY):
            yield _joined(story)
            story = []
        story.append(paragraph)
    yield _joined(story)


def _joined(paragraphs: list[str]) -> str:
    return "\n\n".join(paragraphs).strip().encode("ascii", "ignore").decode()


def main(out: str, *sources: str) -> None:
    stories: dict[str, str] = {}  # by their beginnings: excerpts overlap
    for source in sources:
        for story in split_stories(Path(source).read_text(encoding="utf-8", errors="ignore")):
            if MIN_STORY < len(story) < MAX_STORY and story[-1] in '."!?':
                stories.setdefault(story[:80], story)
    documents = list(stories.values())
    Random(0).shuffle(documents)
    write_documents(out, documents)
    print(len(documents), "stories,", sum(map(len, documents)), "characters")


if __name__ == "__main__":
    main(*sys.argv[1:])
