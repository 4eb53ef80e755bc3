"""What a chat template may use: a short list of filters and of methods of strings, each looked at before it is called.

What is missing is missing on purpose: center, format, batch, sum, xmlattr and their kind can make much of little, and
no chat template needs them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from .budget import CALL, Budget, TooMuch

FILTERS = (
    *("abs capitalize count d default dictsort e escape first float indent int items join last length".split()),
    *("list lower map max min reject rejectattr replace reverse round safe select selectattr sort string".split()),
    *("title trim unique upper".split()),
)
STR_METHODS = frozenset(
    "capitalize count endswith find format index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip swapcase title upper".split()
)
REVERSE_METHODS = frozenset("rfind rindex rpartition rsplit strip lstrip rstrip".split())
MAX_DEPTH = 32  # of what is written as JSON with indentation


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: plain JSON, without jinja2's escapes for HTML."""
    if indent is not None and (not isinstance(indent, int) or not 0 <= indent <= 16):
        raise ValueError(f"tojson: indent is {indent!r}; expected 0 to 16")
    if separators is not None and any(len(one) > 16 for one in separators):
        raise ValueError("tojson: separators of more than 16 characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def own_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what jinja2 adds for loops and blocks."""
    return {name: value for name, value in kwargs.items() if not name.startswith("_")}


def checked_method(budget: Budget, text: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a method of a string; it takes none by name."""
    if name == "replace":
        budget.replace(text, *args)
    elif name == "join":
        return (budget.join(text, args[0]), *args[1:])
    elif name in REVERSE_METHODS:
        budget.needles(*args)
    return args


def metered(budget: Budget, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or a test which looks at sizes before, and pays for its result after."""
    n_head = int(hasattr(function, "jinja_pass_arg"))  # the environment, or where to find it

    @functools.wraps(function)  # with the marks that tell jinja2 which of them it wants
    def call(*args: Any, **kwargs: Any) -> Any:
        head, own = args[:n_head], args[n_head:]
        budget.spend(CALL)
        if check := _CHECKS.get(name):
            own, kwargs = check(budget, head, own, kwargs)
        return budget.seen(function(*head, *own, **kwargs))

    return call


Given = tuple[tuple[Any, ...], dict[str, Any]]


def _check_replace(budget: Budget, _: Any, own: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    budget.replace(*own, **kwargs)
    return own, kwargs


def _check_join(budget: Budget, head: Any, own: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    def values(value: Any, d: Any = "", attribute: Any = None) -> Given:
        return (budget.join(d, value if attribute is None else _attributes(head, value, attribute)), d), {}

    return values(*own, **kwargs)


def _check_indent(budget: Budget, _: Any, own: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    budget.indent(*own, *kwargs.values())
    return own, kwargs


def _check_numbers(budget: Budget, _: Any, own: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    budget.numbers(*own[1:], *kwargs.values())
    return own, kwargs


def _check_needles(budget: Budget, _: Any, own: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    budget.needles(*own[1:], *kwargs.values())
    return own, kwargs


def _check_whole(budget: Budget, _: Any, own: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    budget.whole(own[0])
    return own, kwargs


def _check_order(budget: Budget, head: Any, own: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """Of sort, min, max, unique: what is compared may be one long text, many times."""
    values = list(own[0])
    budget.whole(values)
    attribute = kwargs.get("attribute") or next((a for a in own[1:] if isinstance(a, str)), None)
    for part in str(attribute).split(",") if attribute is not None else ():
        budget.whole(list(_attributes(head, values, part)))
    return (values, *own[1:]), kwargs


def _check_tojson(budget: Budget, _: Any, own: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    before = budget.left
    budget.whole(own[0])
    indent = kwargs.get("indent", own[2] if len(own) > 2 else None)
    if indent is not None:
        _check_depth(own[0])
        budget.spend(before - budget.left)
    return own, kwargs


def _check_depth(value: Any, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise TooMuch
    for one in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _check_depth(one, depth + 1)


def _attributes(head: Any, values: Any, attribute: Any) -> Iterator[Any]:
    from jinja2.filters import make_attrgetter

    return map(make_attrgetter(getattr(head[0], "environment", head[0]), attribute), values)


_CHECKS: dict[str, Callable[[Budget, Any, tuple[Any, ...], dict[str, Any]], Given]] = {
    "replace": _check_replace,
    "join": _check_join,
    "indent": _check_indent,
    **dict.fromkeys(("round", "int"), _check_numbers),
    "trim": _check_needles,
    **dict.fromkeys(("string", "e", "escape", "title", "upper", "lower", "capitalize"), _check_whole),
    **dict.fromkeys(("sort", "min", "max", "unique"), _check_order),
    "tojson": _check_tojson,
}
