"""Where a chat template runs: it is code out of a model file, which nobody has read, and the CPU and memory are ours.

jinja2's immutable sandbox keeps a template from Python's insides. It bounds neither time nor memory: three nested loops
run for hours, and `{% set x = x ~ x %}` forty times is a terabyte. So the template is rewritten before it is compiled,
such that everything which repeats or grows pays from a budget first:

    {% for %}, macros         each round pays for itself and for the text in it
    ~ + * ** % [a:b] [] {}    replaced by functions that look at the size of the result before they make it
    {{ x }}, filters, calls   pay for the text or the items that come out; filters and methods are a short list
    comparisons               pay a little for the text they look through

The prices are in budget.py. There is no signal, no tracer and no second process in it: it works in any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..errors import EngineError
from .budget import ROUND, Budget, TooMuch
from .filters import FILTERS, STR_METHODS, checked_method, metered, own_arguments, tojson

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE = 1 << 16  # characters of a template; the longest known has 11,000, and compiling takes time, too
MAX_OUTPUT = 1 << 25  # characters of a conversation


class Sandbox:
    """One template, compiled.

    mark    what becomes of the template's own text (not of what it compares with): where it spells a control token
            it is given a form that no message can have
    """

    def __init__(self, source: str, mark: Callable[[str], str]) -> None:
        if len(source) > MAX_SOURCE:
            raise EngineError(f"the chat template has {len(source):,} characters, expected at most {MAX_SOURCE:,}")
        self.budget = Budget()
        self._environment = _environment(self.budget)
        try:
            self._template = _compile(self._environment, source, mark)
        except Exception as error:
            raise EngineError(f"the chat template cannot be read: {_why(error)}") from None

    def render(self, variables: dict[str, Any], units: int) -> str:
        """EngineError: it raised an exception, does too much, or writes too much. Not for two threads at once."""
        self.budget.start(units)
        try:
            return self._joined(self._template.root_render_func(self._template.new_context(variables)))
        except TooMuch:
            raise EngineError("the chat template was stopped: it does far more than a chat template needs") from None
        except Exception as error:
            raise EngineError(f"the chat template failed: {_why(error)}") from None

    def _joined(self, pieces: Iterator[str]) -> str:
        made, length = [], 0
        for piece in pieces:
            length += len(piece)
            if length > MAX_OUTPUT:
                raise TooMuch
            made.append(piece)
        return "".join(made)


def _why(error: Exception) -> str:
    """In one short line."""
    if isinstance(error, RecursionError | MemoryError):
        return "it is nested too deeply"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def _environment(budget: Budget) -> ImmutableSandboxedEnvironment:
    from jinja2 import TemplateError, pass_context
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, str):
                return attr in STR_METHODS
            if isinstance(obj, int | float | bytes | type):  # dict.update would change what has been counted
                return False
            return super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> Any:
            """What takes the place of str.format and str.format_map."""
            function = super().wrap_str_format(value)
            if function is None:
                return None

            def checked(*args: Any, **kwargs: Any) -> Any:
                budget.format(value.__self__, [args, own_arguments(kwargs)], "{")
                return function(*args, **kwargs)

            return checked

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget.binop(operator, left, right)
            result = super().call_binop(context, operator, left, right)
            return budget.whole(result) if isinstance(result, list | tuple) else budget.scan(result)

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            owner = getattr(__obj, "__self__", None)
            if owner is budget:
                return __obj(*args)
            budget.spend(ROUND)
            for one in (*args, *own_arguments(kwargs).values()):
                if isinstance(one, dict | list | tuple):
                    budget.whole(one, characters=False)
            if isinstance(owner, str):
                args = checked_method(budget, owner, __obj.__name__, args)
            result = super().call(__context, __obj, *args, **kwargs)
            return budget.whole(result) if isinstance(result, dict | list | tuple) else budget.seen(result)

    def raise_exception(message: Any) -> None:
        raise TemplateError(str(message))

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(str(format)[:100])

    @pass_context
    def finalize(_: Any, value: Any) -> Any:
        return budget.whole(value)

    made = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # nothing is computed while it is compiled
        finalize=finalize,
        extensions=["jinja2.ext.loopcontrols", _generation()],
    )
    filters: dict[str, Any] = {**{name: made.filters[name] for name in FILTERS}, "tojson": tojson}
    made.filters = {name: metered(budget, name, function) for name, function in filters.items()}
    tests: dict[str, Any] = dict(made.tests)
    made.tests = {name: metered(budget, name, function) for name, function in tests.items()}
    made.globals = {name: made.globals[name] for name in ("range", "dict", "cycler", "joiner", "namespace")}
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    made.metered = budget  # type: ignore[attr-defined]
    return made


def _generation() -> Any:
    """{% generation %} … {% endgeneration %}: marks an answer for training; here it is what is inside."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            lineno = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)

    return Generation


def _compile(environment: ImmutableSandboxedEnvironment, source: str, mark: Callable[[str], str]) -> Template:
    from jinja2 import Template, nodes
    from jinja2.visitor import NodeTransformer

    def call(name: str, *args: Any) -> nodes.Expr:
        return nodes.Call(nodes.EnvironmentAttribute(f"metered.{name}"), list(args), [], None, None)

    def pay(body: list[nodes.Node]) -> nodes.Node:
        """What a round of this body costs, as its first statement."""
        return nodes.ExprStmt(call("round", nodes.Const(sum(map(_text_length, body)))))

    class Meter(NodeTransformer):
        compares = 0  # depth of what is only looked at

        def visit_For(self, node: nodes.For) -> nodes.Node:
            self.generic_visit(node)
            node.iter = call("iterate", node.iter)
            node.body.insert(0, pay(node.body))
            return node

        def visit_Macro(self, node: Any) -> nodes.Node:
            self.generic_visit(node)
            node.body.insert(0, pay(node.body))
            return node

        visit_CallBlock = visit_Macro

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
            self.generic_visit(node)
            return call("concat", *node.nodes)

        def visit_List(self, node: Any) -> nodes.Node:
            self.generic_visit(node)
            return call("whole", node)

        visit_Dict = visit_List

        def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
            self.generic_visit(node)
            return call("whole", node) if node.ctx == "load" else node

        def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
            self.generic_visit(node)
            return call("seen", node) if isinstance(node.arg, nodes.Slice) else node

        def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
            self.compares += 1
            self.generic_visit(node)
            self.compares -= 1
            for operand in node.ops:
                operand.expr = call("scan", operand.expr)
            return node

        def visit_Call(self, node: nodes.Call) -> nodes.Node:
            """The arguments of content.split('…') are looked for, not written."""
            method = isinstance(node.node, nodes.Getattr) and node.node.attr in STR_METHODS - {"format", "join"}
            self.compares += method
            self.generic_visit(node)
            self.compares -= method
            return node

        def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
            self.compares += node.name == "replace"
            self.generic_visit(node)
            self.compares -= node.name == "replace"
            return node

        def visit_Const(self, node: nodes.Const) -> nodes.Node:
            if isinstance(node.value, str) and not self.compares:
                node.value = mark(node.value)
            return node

        def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
            node.data = mark(node.data)
            return node

    tree = Meter().visit(environment.parse(source))
    tree.set_environment(environment)
    tree.set_lineno(0)
    return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


def _text_length(node: Any) -> int:
    """Characters of the text in a piece of template, without the loops and macros in it, which pay themselves."""
    name = type(node).__name__
    if name == "TemplateData":
        return len(node.data)
    if name in ("For", "Macro", "CallBlock"):
        return 0
    return sum(_text_length(child) for child in node.iter_child_nodes())
