"""What a chat template may still do: everything in it that repeats or grows pays here, before it is made.

The budget is a number that grows with the messages, not a time: what a template may do is the same on every machine, in
every thread. A deadline stands behind it, for what is dearer than it should be.
"""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, KeysView, ValuesView
from typing import Any

ROUND, CALL = 20, 5  # what a round of a loop or a call, and a filter cost; a character, or an item of a list, costs 1
BASE, PER_UNIT = 1_000_000, 50  # of budget: to begin with, and for each character of the messages
SECONDS = 10.0
MAX_NUMBER = 1 << 12  # bits
MAX_ARGUMENT = 1000  # of a number that says how wide, how precise
MAX_NEEDLE = 256  # characters to be searched from the right or stripped, for which CPython may take needle * text

_PERCENT = re.compile(r"%(?:\([^)]{0,64}\))?[-+ #0]*(?:\d{4}|\d*\.\d{4}|\d*\.?\*)")
_BRACES = re.compile(r"\{[^{}]*(?:\d{4}|\{)")
_CONTAINERS = (list, tuple, set, frozenset, ItemsView, KeysView, ValuesView)


class TooMuch(Exception):
    """The template has used up its budget, or asks for something that nobody needs."""


class Budget:
    """Functions return what they were given, or raise TooMuch."""

    def __init__(self) -> None:
        self.left, self.deadline = BASE, float("inf")

    def start(self, units: int) -> None:
        """units: characters and items of what the template is given."""
        self.left = BASE + PER_UNIT * units
        self.deadline = time.monotonic() + SECONDS

    def spend(self, n: int) -> None:
        self.left -= n
        if self.left < 0 or time.monotonic() > self.deadline:
            raise TooMuch

    # ------------------------------------------------------------------------- what the template is rewritten to call

    def round(self, cost: int) -> str:
        """Of a loop or a macro, with so much text in it."""
        self.spend(ROUND + cost)
        return ""

    def scan(self, value: Any) -> Any:
        """What is compared with something, or looked for in."""
        self.spend(1 + (len(value) // 32 if isinstance(value, str | list | tuple) else 0))
        return value

    def iterate(self, value: Any) -> Any:
        """What a loop goes over."""
        self.spend(len(value) if hasattr(value, "__len__") else 1)
        return value

    def seen(self, value: Any) -> Any:
        """A result that is no larger than what it was made of: its characters or items, without what those hold."""
        self.spend(len(value) if isinstance(value, str | list | tuple | dict) else 1)
        return value

    def whole(self, value: Any, characters: bool = True) -> Any:
        """A result that may hold one thing many times: every character and item, counted as often as it occurs.

        Lists of lists of one list: sixty of them, and no comparison of two ever ends.
        """
        stack = [value]
        while stack:
            one = stack.pop()
            if isinstance(one, str):
                self.spend(len(one) + 1 if characters else 1)
                continue
            self.spend(1)
            if isinstance(one, dict):
                stack += one.keys()
                stack += one.values()
            elif isinstance(one, _CONTAINERS):
                stack += one
            elif type(one).__name__ == "Namespace":  # it could be changed after it was counted
                raise TooMuch
        return value

    def concat(self, *values: Any) -> str:
        """The operator ~."""
        return "".join([str(self.whole(value)) for value in values])

    # ------------------------------------------------------------------------------- before something large is made

    def binop(self, operator: str, left: Any, right: Any) -> None:
        if operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MAX_NUMBER:
                raise TooMuch
        elif operator == "*":
            for a, b in ((left, right), (right, left)):
                if isinstance(a, str | list | tuple) and isinstance(b, int):
                    self.spend(len(a) * max(b, 0))
            if isinstance(left, int) and isinstance(right, int):
                if left.bit_length() + right.bit_length() > MAX_NUMBER:
                    raise TooMuch
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self.spend(len(left) + len(right))
        elif operator == "%" and isinstance(left, str):
            self.format(left, right, "%")

    def format(self, text: str, arguments: Any, sign: str) -> None:
        """By '%' or '{': width and precision may ask for any amount, and an argument be written many times."""
        if (_PERCENT if sign == "%" else _BRACES).search(text):
            raise TooMuch
        before = self.left
        self.whole(arguments)
        self.spend(len(text) + (before - self.left) * text.count(sign))

    def replace(self, text: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
        text, old, new = (str(self.whole(value)) for value in (text, old, new))
        self.spend(len(new) * (text.count(old) if old else len(text) + 1))

    def join(self, separator: Any, values: Any) -> list[Any]:
        """values, as a list, when there is room for the text that they make."""
        made = []
        for value in values:
            self.whole(value)
            self.spend(len(str(separator)))
            made.append(value)
        return made

    def indent(self, text: Any, *arguments: Any) -> None:
        self.numbers(*arguments)
        width = max([4, *(len(a) if isinstance(a, str) else int(a) for a in arguments if isinstance(a, int | str))])
        self.spend((str(self.whole(text)).count("\n") + 1) * width)

    def numbers(self, *arguments: Any) -> None:
        if any(isinstance(one, int | float) and abs(one) > MAX_ARGUMENT for one in arguments):
            raise TooMuch

    def needles(self, *arguments: Any) -> None:
        if any(isinstance(one, str) and len(one) > MAX_NEEDLE for one in arguments):
            raise TooMuch
