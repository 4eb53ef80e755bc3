"""Stop strings are never half shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import EngineError
from engine.stopping import StopStrings


def shown(pieces: list[str], stops: list[str]) -> str:
    stopping = StopStrings(stops)
    return "".join(stopping.push(p) for p in pieces) + stopping.flush()


def test_text_before_the_stop_string_is_shown() -> None:
    assert shown(["Hello wor", "ld. En", "d of story"], ["End"]) == "Hello world. "


def test_a_beginning_that_leads_nowhere_is_shown_in_the_end() -> None:
    assert shown(["one E", "n"], ["End"]) == "one En"


def test_the_earliest_of_several_ends_the_text() -> None:
    assert shown(["a b c"], ["c", "b"]) == "a "


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(EngineError, match="non-empty"):
        StopStrings([""])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_pieces_make_no_difference(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    ends = [at for at in (text.find(s) for s in stops) if at >= 0]
    assert shown(pieces, stops) == text[: min(ends, default=len(text))]
