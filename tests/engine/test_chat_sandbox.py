"""Hostile chat templates: none escapes, none runs for long, none takes much memory."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from engine.chat import budget, sandbox
from engine.chat.sandbox import Sandbox
from engine.errors import EngineError
from engine.generation import peak_memory

MESSAGES = [{"role": "user", "content": "hello " * 50}]
DOUBLING = "{% set x = x ~ x %}"
STOPPED = "was stopped: it does far more than a chat template needs"


def render(source: str, messages: list[Any] | None = None) -> str:
    made = Sandbox(source, lambda text: text)
    given = MESSAGES if messages is None else messages
    return made.render({"messages": given, "tools": None}, sum(len(m["content"]) + 3 for m in given))


LOOPS = {
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "nested lists": "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "a filter in a loop": "{% set r = range(99999) %}{% for a in r %}{% for b in r if false %}{% endfor %}{% endfor %}",
    "text in a loop": "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "macros in macros": "{% macro f(n) %}{% for i in range(9) %}{{ f(n + 1) if n < 90 }}{% endfor %}{% endmacro %}"
    "{{ f(0) }}",
    "a loop that calls itself": "{% for a in [1, 2] recursive %}{{ loop([1, 2, 3]) if loop.depth < 60 }}{% endfor %}",
    "blocks in blocks": "".join(
        f"{{% block b{i} %}}{{{{ self.b{i + 1}() }}}}{{{{ self.b{i + 1}() }}}}{{% endblock %}}" for i in range(60)
    )
    + "{% block b60 %}{% endblock %}",
    "map over map": "{% set r = range(99999) %}{% for a in r %}{{ r | map('string') | list | length }}{% endfor %}",
    "select": "{% for a in range(99999) %}{% set z = range(99999) | select('odd') | list %}{% endfor %}",
    "sums of comparisons": "{% set x = 'a' * 500000 %}" + "{{ 'aab' in x }}" * 3000,
}
SMALL = "{% set x = 'a' * 400000 %}"
NAMESPACE = "{% set ns = namespace(x='a' * 400000) %}{% set r = [ns] * 90000 %}"
GROWTH = {
    "one argument, formatted many times": SMALL + "{{ ('%(x)s' * 3000) % {'x': x} }}",
    "one argument of format(), many times": SMALL + "{{ ('{0}' * 3000).format(x) }}",
    "replace in a number": SMALL + "{{ (10 ** 1000) | replace('0', x) }}",
    "round": "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "int of a base": "{{ '1' | int(0, 10 ** 9) }}",
    "towers by dict() compared": "{% set x = 1 %}{% set y = 1 %}"
    + "{% set x = dict(a=x, b=x) %}{% set y = dict(a=y, b=y) %}" * 60
    + "{{ x == y }}",
    "towers by varargs": "{% set ns = namespace(x=1) %}{% macro f() %}{% set ns.x = varargs %}{% endmacro %}"
    + "{{ f(ns.x, ns.x) }}" * 60,
    "towers by cycler": "{% set x = 1 %}" + "{% set x = cycler(x, x).items %}" * 60 + "{{ x == x }}",
    "towers of views": "{% set x = {'a': 1} %}" + "{% set x = {'a': x.items(), 'b': x.items()} %}" * 60 + "{{ x }}",
    "towers from the top": "{% set y = {} %}{% set x = {'a': y, 'b': y} %}{{ dict.update(y, {'a': 1}) }}{{ 1 / 0 }}",
    "towers of namespaces": "{% set ns = namespace(x=1) %}"
    + "".join(f"{{% set n{i} = namespace() %}}" for i in range(30))
    + "".join(f"{{% set n{i + 1}.a = n{i} %}}{{% set n{i + 1}.b = n{i} %}}" for i in range(29))
    + "{{ n29 }}",
    "sort of one text": NAMESPACE + "{{ r | sort(attribute='x') | length }}",
    "min of one text": NAMESPACE + "{{ r | min('x') }}",
    "unique by two attributes": NAMESPACE + "{{ r | sort(attribute='x,x') | length }}",
    "rfind": "{% set x = 'a' * 400000 %}{% set y = 'ab' + 'a' * 200000 %}{{ x.rfind(y) }}",
    "strip": "{% set x = 'a' * 300000 %}{% set y = 'b' * 300000 + 'a' %}{{ x.strip(y) }}",
    "trim": "{% set x = 'a' * 300000 %}{% set y = 'b' * 300000 + 'a' %}{{ x | trim(y) }}",
    "JSON, deep and wide": "{% set ns = namespace(x=[1] * 100000) %}"
    "{% for i in range(400) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson(indent=16) }}",
    "JSON with long separators": SMALL + "{{ ([1] * 90000) | tojson(separators=(x, x)) }}",
    "a string times a number": "{{ 'a' * 10**9 }}",
    "a number times a string": "{{ 10**9 * 'a' }}",
    "a list times a number": "{{ ([1] * 10**9) | length }}",
    "doubling by ~": "{% set x = 'ab' %}" + DOUBLING * 60,
    "doubling by +": "{% set x = 'ab' %}" + "{% set x = x + x %}" * 60,
    "doubling by set blocks": "{% set x = 'ab' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubling a list": "{% set x = [1] %}" + "{% set x = x + x %}" * 60 + "{{ x | length }}",
    "a tower of lists": "{% set x = 'ab' %}" + "{% set x = [x, x] %}" * 60 + "{{ x }}",
    "a tower of dicts as JSON": "{% set x = 'ab' %}" + "{% set x = {'a': x, 'b': x} %}" * 60 + "{{ x | tojson }}",
    "towers compared": "{% set x = 1 %}{% set y = 1 %}"
    + "{% set x = [x, x] %}{% set y = [y, y] %}" * 60
    + "{{ x == y }}",
    "a tower of tuples as a key": "{% set x = 1 %}" + "{% set x = (x, x) %}" * 60 + "{{ {x: 1} }}",
    "a tower by dict()": "{% set x = 1 %}" + "{% set x = dict(a=x, b=x) %}" * 60 + "{{ x }}",
    "a tower in a namespace": "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
    "{% endfor %}{{ ns.x }}",
    "replace": "{% set x = 'a' * 100000 %}{{ x | replace('a', x) }}",
    "replace nothing": "{% set x = 'a' * 100000 %}{{ x | replace('', x) }}",
    "replace as a method": "{% set x = 'a' * 100000 %}{{ x.replace('a', x) }}",
    "join": "{% set x = 'a' * 100000 %}{{ range(99999) | join(x) }}",
    "join as a method": "{% set x = 'a' * 100000 %}{{ x.join(['b'] * 90000) }}",
    "join of an attribute": "{% set x = 'a' * 100000 %}{{ ([{'a': 'b'}] * 90000) | join(x, attribute='a') }}",
    "join by name": "{% set x = 'a' * 100000 %}{{ (['b'] * 90000) | join(d=x) }}",
    "indent": "{{ ('a\n' * 1000) | indent(10**7) }}",
    "indent by a text": "{% set x = 'a' * 100000 %}{{ ('a\n' * 90000) | indent(x) }}",
    "width of a format": "{{ '%999999999d' % 1 }}",
    "width as an argument": "{{ '%*d' % (999999999, 1) }}",
    "width of format()": "{{ '{:999999999}'.format(1) }}",
    "width as an argument of format()": "{{ '{:{}}'.format(1, 999999999) }}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "powers in a loop": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "slices": "{% set x = 'a' * 500000 %}" + "".join(f"{{% set x{i} = x[1:] %}}" for i in range(2000)),
    "output": "{% set x = 'a' * 500000 %}" + "{{ x }}" * 3000,
    "a macro's output": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set x = 'ab' %}" + "{% set x = f(x) %}" * 60,
    "a filter block": "{% set x = 'a' * 100000 %}{% filter replace('a', x) %}{{ x }}{% endfilter %}",
    "upper of ß, again and again": "{% set x = 'ß' %}" + "{% set x = (x ~ x) | upper %}" * 60,
    "escapes": "{% set x = '<' * 100000 %}" + "{% set x = x | string | e | string | e %}" * 60,
    "a cycler of everything": "{% set c = cycler('a' * 1000000) %}{% for i in range(9999) %}{{ c.next() }}{% endfor %}",
}
SYNTAX = {  # to be read, not to be run
    "braces": "{{" * 30000,
    "blocks": "{%" + " " * 60000,
    "comments": "{#" * 30000,
    "dashes": "{%-" * 20000,
    "brackets": "{{ " + "[" * 60000,
    "strings": "{{ '" + "\\\\" * 20000,
    "ifs": "{% if 1 %}" * 6000,
    "fors": "{% for a in b %}" * 100 + "{% endfor %}" * 100,
    "dots": "{{ a" + ".b" * 30000 + " }}",
    "nots": "{{ " + "not " * 15000 + "1 }}",
    "filters": "{{ 1" + "|abs" * 15000 + " }}",
    "elifs": "{% if 1 %}" + "{% elif 1 %}" * 4000,
    "raws": "{% raw %}" * 7000,
    "names": "{% set " + ", ".join(f"a{i}" for i in range(9000)) + " = 1 %}",
}
ESCAPES = (
    "{{ dict.fromkeys }}{{ dict.update(messages[0], {'content': '2000'}) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ tojson.__globals__ }}",
    "{{ range.__self__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__base__.__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ messages | selectattr('__class__') | list }}",
    "{{ messages[0] | attr('__class__') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{{ ('{0.__class__.__init__.__globals__}' | string).format(raise_exception) }}",
    "{{ [messages] | map('attr', '__class__') | list }}",
    "{{ ['{0.__class__}'] | map('format', messages) | list }}",
    "{{ environment }}{{ environment.metered.left }}",
    "{{ context }}{{ metered.left }}{{ config.x }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages[0].clear() }}",
    "{{ (1).to_bytes(999999999, 'big') }}",
    "{{ (1).__class__ }}",
    "{{ lipsum.__globals__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends 'x' %}",
    "{% macro f() %}{% endmacro %}{{ f.__call__.__globals__ }}{{ f._func.__globals__ }}",
    "{% for a in [1] %}{{ loop.__class__ }}{{ loop._iterator }}{% endfor %}",
    "{% set x %}{% endset %}{{ x.__html__.__self__.__class__ }}",
)


@pytest.mark.parametrize("source", [*LOOPS.values(), *GROWTH.values()], ids=[*LOOPS, *GROWTH])
def test_a_template_that_runs_on_or_grows_is_stopped(source: str) -> None:
    start, before = time.perf_counter(), peak_memory()
    with pytest.raises(EngineError, match=f"{STOPPED}|the chat template failed: "):
        render(source)
    assert time.perf_counter() - start < 15  # about 0.5 s; they would take hours
    assert peak_memory() - before < 0.2


@pytest.mark.parametrize("source", SYNTAX.values(), ids=SYNTAX)
def test_a_template_that_is_hard_to_read_is_refused_soon(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(EngineError, match="the chat template (cannot be read|failed): "):
        render(source)
    assert time.perf_counter() - start < 15


def test_it_is_stopped_in_any_thread() -> None:
    said = []

    def work() -> None:
        try:
            render(LOOPS["nested ranges"])
        except EngineError as error:
            said.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert said == [f"the chat template {STOPPED}"]


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_of_python_is_reached(source: str) -> None:
    before = [dict(message) for message in MESSAGES]
    try:
        written = render(source)
    except EngineError:
        written = ""
    for secret in ("class '", "<function", "built-in", "subclasses", "__", "root:", "object at", "2000"):
        assert secret not in written
    assert before == MESSAGES


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for %}", "the chat template cannot be read: Expected an expression, got 'end of statement block'"),
        ("{{ x | nothing }}", "the chat template cannot be read: No filter named 'nothing'."),
        ("{{ raise_exception('roles must\nalternate') }}", "the chat template failed: roles must alternate"),
        ("{{ 1 + 'a' }}", "the chat template failed: unsupported operand"),
        ("{{ messages.x.y }}", "the chat template failed: 'list object' has no attribute 'x'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the chat template failed: it is nested too deeply"),
        (
            "(" * 10 + "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
            "the chat template cannot be read: it is nested too",
        ),
        ("{{ " + "+".join("1" * 9999) + " }}", "the chat template cannot be read: it is nested too"),
        ("x" * (1 << 16) + "x", "the chat template has 65,537 characters, expected at most 65,536"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_sentence(source: str, said: str) -> None:
    with pytest.raises(EngineError) as caught:
        render(source)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_output_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_OUTPUT", 100)
    with pytest.raises(EngineError, match=STOPPED):
        render("{{ 'x' * 101 }}")


def test_time_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "SECONDS", 0.0)
    with pytest.raises(EngineError, match=STOPPED):
        render("{% for m in messages %}{% endfor %}")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'a': 'ü<&>', 'b': [1]} | tojson }}", '{"a": "ü<&>", "b": [1]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=2) }}", '{\n  "b": 1,\n  "a": 2\n}'),
        ("{{ {'b': 1} | tojson(separators=(',', ':')) }}", '{"b":1}'),
        ("a{% generation %}b{{ 1 }}{% endgeneration %}c", "ab1c"),
        (
            "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i == 4 %}{% break %}{% endif %}{{ i }}"
            "{% endfor %}",
            "013",
        ),
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{% set ns = namespace(n=0) %}{% for i in [1, 2] %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{{ 'a-b' | replace('-', '+') }}{{ ['x', 'y'] | join(', ') }}{{ ', '.join(['x', 'y']) }}", "a+bx, yx, y"),
        ("{{ [{'a': 1}, {'a': 2}] | join('-', attribute='a') }}", "1-2"),
        ("{{ '%s and %5.2f' % ('x', 1.5) }}{{ '{} {:>3}'.format('x', 'y') }}", "x and  1.50x   y"),
        ("{{ 'In 2024: %s' % 'x' }}{{ {'b': 1} | tojson }}{{ 1.26 | round(1) }}", 'In 2024: x{"b": 1}1.3'),
        ("{{ [{'a': 2}, {'a': 1}] | sort(attribute='a') | map(attribute='a') | list }}", "[1, 2]"),
        ("{{ 'a\nb' | indent(2) }}{{ 2 ** 10 }}{{ 7 // 2 }}{{ 'ab' * 2 }}", "a\n  b10243abab"),
        ("{{ messages[::-1][0].role }}{{ messages[-1]['content'][:5] }}{{ nothing }}", "userhello"),
        ("{% macro f(x, y='z') %}<{{ x }}{{ y }}>{% endmacro %}{{ f('a') }}{{ f(y=1, x=2) }}", "<az><21>"),
        ("{% macro f() %}<{{ caller(1) }}>{% endmacro %}{% call(x) f() %}{{ x }}{% endcall %}", "<1>"),
        ("{% set c %}a{{ 1 }}{% endset %}{{ c | trim | upper }}{{ c is string }}", "A1True"),
        ("{{ ['b', 'a'] | sort | first }}{{ {'k': 'v'}.items() | list }}", "a[('k', 'v')]"),
        ("{{ strftime_now('%%') }}{{ none }}{{ 'x' if 1 is defined }}", "%Nonex"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}{{ messages | length }}", "a=11"),
        ("{% if ('a', 'b') == ('a', 'b') and 'a' in ['a'] %}{{ 'a' ~ 1 ~ [2] }}{% endif %}", "a1[2]"),
    ],
)
def test_what_templates_use_works(source: str, expected: str) -> None:
    assert render(source) == expected


def test_a_long_conversation_has_budget_enough() -> None:
    """A million characters in two thousand messages, each looked at by others."""
    source = (
        "{% for m in messages %}{% set c = m.content.split('</think>')[-1].strip() %}"
        "{% if messages[loop.index0 - 1].role == 'user' %}{{ c | trim }}{% endif %}{{ '<' ~ m.role ~ '>' + c }}"
        "{% endfor %}"
    )
    messages = [{"role": "user", "content": "word " * 100}] * 2000
    assert len(render(source, messages)) > 1_000_000
