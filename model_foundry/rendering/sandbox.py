"""Run a chat template that may be hostile: no way to Python's internals, and a bound on work, memory and output.

Templates come with downloaded models, so they are other people's code. jinja2's sandbox keeps them away from
attributes and files; it does not keep them from running for ever or filling the memory. Here every loop iteration,
macro, call and filter draws on one budget for the rendering, everything that can make something big out of something
small is measured first, and only filters and methods that chat templates use exist.

What it computes is what `transformers` computes: same whitespace rules, same globals, same `tojson`.
Knows nothing of tokens or roles.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from types import BuiltinMethodType, GeneratorType
from typing import Any, ClassVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from model_foundry.errors import TemplateError, UnsafeTemplateError
from model_foundry.rendering.amplifiers import (
    allow_bits,
    allow_join,
    allow_percent,
    allow_product,
    allow_str_method,
    check_filter,
)
from model_foundry.rendering.budget import Budget

MAX_TEMPLATE_CHARS = 100_000
MAX_CPU_SECONDS = 2.0

# Private characters around what `{% generation %}` blocks print; the caller takes them out again.
GENERATION_START = "\U0010fff0"
GENERATION_END = "\U0010fff1"

FILTERS = """
    abs capitalize count d default dictsort e escape first float format groupby indent int items join last length list
    lower map max min reject rejectattr replace reverse round safe select selectattr sort string sum title trim unique
    upper wordcount
"""
_CHEAP_FILTERS = ("first", "length", "count", "last", "default", "d", "trim", "items")
GLOBALS = ("cycler", "joiner")
_STR_METHODS = """
    capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit isidentifier
    islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix
    replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper
"""
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR_METHODS.split()),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index"}),
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    float: frozenset({"is_integer"}),
}


class _Guard(NodeTransformer):
    """Puts a budget step into everything that repeats, and measures containers and `~` where they are made."""

    def _with_step(self, node: Any) -> Any:
        node = self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._filter(nodes.Const(0), "guard step"), lineno=node.lineno))
        return node

    visit_For = visit_Macro = visit_CallBlock = visit_Block = _with_step

    def visit_Output(self, node: nodes.Output) -> Any:
        self.generic_visit(node)
        num_chars = sum(len(child.data) for child in node.nodes if isinstance(child, nodes.TemplateData))
        if num_chars == 0:
            return node
        emit = self._filter(nodes.Const(num_chars, lineno=node.lineno), "guard emit")
        return [nodes.ExprStmt(emit, lineno=node.lineno), node]

    def visit_Call(self, node: Any) -> nodes.Node:
        """Unpacking `*values` takes them all at once."""
        self.generic_visit(node)
        if node.dyn_args is not None:
            node.dyn_args = self._filter(node.dyn_args, "guard collect")
        return node

    visit_Filter = visit_Test = visit_Call

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes, lineno=node.lineno), "guard concat")

    def _measured(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        plain = all(isinstance(child, (nodes.Const, nodes.TemplateData)) for child in node.iter_child_nodes())
        if plain or getattr(node, "ctx", "load") != "load":
            return node
        return self._filter(node, "guard weigh")

    visit_List = visit_Tuple = visit_Dict = _measured

    @staticmethod
    def _filter(node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}`: marks what the assistant writes, as transformers' templates may."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        start, end = (
            nodes.Output([nodes.TemplateData(mark)], lineno=lineno) for mark in (GENERATION_START, GENERATION_END)
        )
        return nodes.Scope([start, *body, end], lineno=lineno)


class _SafeNamespace(Namespace):
    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the attributes
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _refuse_private_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private_name(name)
        Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # not the contents: namespaces within namespaces would print without end


class _Environment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox as transformers sets it up, with the budget drawn in."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: datetime) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # constants are folded while compiling, when no budget holds
            extensions=[_GenerationBlock, LoopControlExtension],
            finalize=self._finalize,
        )
        self.budget = Budget(0, max_cpu_seconds=MAX_CPU_SECONDS)
        allowed = {name: self.filters[name] for name in FILTERS.split()} | {"tojson": _to_json}
        self.filters = {name: self._guarded(name, function) for name, function in allowed.items()}
        self.filters |= {
            "guard step": lambda _: self.budget.step(),
            "guard emit": lambda num_chars: self.budget.emit(num_chars),
            "guard concat": self._concat,
            "guard weigh": lambda value: self.budget.made(value),
            "guard collect": self._collected,
        }
        self.globals = {name: self.globals[name] for name in GLOBALS} | {
            "range": self._range,
            "dict": dict,
            "namespace": _SafeNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": lambda pattern: now.strftime(str(pattern)[:1000]),
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Guard().visit(super()._parse(source, name, filename))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"the chat template may not read {attribute!r} of a {type(obj).__name__}")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return self.budget.joined(left, right)
        if operator == "+" and isinstance(left, (list, tuple)):
            self.budget.allow(self.budget.weigh(left) + self.budget.weigh(right))
        elif operator == "*":
            allow_product(self.budget, left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            allow_bits(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            allow_percent(self.budget, left, right)
        return self.budget.made(self.binop_table[operator](left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self, method = __self, __obj
        self.budget.step()
        args = tuple(self._collected(value) for value in args)
        method = getattr(method, "__wrapped__", method)  # jinja2 wraps str.format in a function of its own
        if isinstance(method, BuiltinMethodType):
            owner, name = method.__self__, method.__name__
            if name not in METHODS.get(type(owner), ()):
                raise SecurityError(f"chat templates may not call {name!r} of a {type(owner).__name__}")
            if isinstance(owner, str):
                allow_str_method(self.budget, owner, name, args, kwargs)
        return self.budget.made(super().call(__context, __obj, *args, **kwargs))

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that draws on the budget. `wraps` keeps jinja2's mark for filters that take the environment."""
        position = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.budget.step()
            values = tuple(self._collected(value) for value in args[position:])
            if name not in _CHEAP_FILTERS:
                check_filter(self.budget, name, values[0], values[1:], kwargs)
            return self.budget.made(function(*args[:position], *values, **kwargs))

        return guarded

    def _concat(self, values: list[Any]) -> str:
        allow_join(self.budget, "", values)
        return self.budget.made("".join([str(value) for value in values]))

    def _collected(self, value: Any) -> Any:
        return self.budget.collect(value) if isinstance(value, GeneratorType) else value

    @pass_context  # so that nothing is folded while compiling
    def _finalize(self, context: Any, value: Any) -> Any:
        if isinstance(value, str):
            self.budget.emit(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.budget.emit(self.budget.weigh(value))
        return value

    def _range(self, *args: Any) -> range:
        numbers = range(*args)
        self.budget.allow(len(numbers))
        return numbers


def parse_template(source: str) -> nodes.Template:
    """The syntax tree of a chat template, as its author wrote it: nothing is run, and no budget is drawn in."""
    extensions = [_GenerationBlock, LoopControlExtension]
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions).parse(source)


_UNSAFE = "Use a template you trust"


class CompiledTemplate:
    """A chat template ready to run. Thread-safe: one rendering at a time.

    Args:
        source: the Jinja text.
        name: what to call it in errors.
        now: the time `strftime_now` tells, fixed so that the same data gives the same tokens all through a run.
        max_cpu_seconds: how long a rendering of a small input may take.

    Raises:
        TemplateError: the template is too long or is not valid Jinja.
    """

    def __init__(self, source: str, *, name: str, now: datetime, max_cpu_seconds: float = MAX_CPU_SECONDS) -> None:
        self.name = name
        self._max_cpu_seconds = max_cpu_seconds
        self._lock = threading.Lock()
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"the chat template is longer than {MAX_TEMPLATE_CHARS:,} characters", where=name)
        self._environment = _Environment(now)
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            what = f"the chat template is not valid: {error.message}"
            raise TemplateError(what, where=f"{name}:{error.lineno}") from error
        except (RecursionError, MemoryError, SyntaxError, ValueError, TypeError) as error:
            raise TemplateError("the chat template cannot be compiled: it is nested too deeply", where=name) from error

    def render(self, variables: Mapping[str, Any], *, num_input_chars: int) -> str:
        """The rendered text.

        Args:
            variables: plain data only (dict, list, str, numbers, None).
            num_input_chars: size of that data, which the output may exceed eightfold.

        Raises:
            UnsafeTemplateError: the template overstepped what a template may do or use.
            TemplateError: the template raised or failed.
        """
        with self._lock:
            self._environment.budget = Budget(num_input_chars, max_cpu_seconds=self._max_cpu_seconds)
            try:
                return self._template.render(variables)
            except SecurityError as error:
                raise UnsafeTemplateError(str(error), where=self._place(error), hint=_UNSAFE) from error
            except jinja2.TemplateError as error:
                raise TemplateError(f"the chat template refuses the row: {error}", where=self._place(error)) from error
            except (RecursionError, MemoryError) as error:
                what = "the chat template does not come to an end"
                raise UnsafeTemplateError(what, where=self.name, hint=_UNSAFE) from error
            except Exception as error:  # any Python error the template's expressions can cause
                what = f"the chat template fails with {type(error).__name__}: {error}"
                raise TemplateError(what, where=self._place(error)) from error

    def _place(self, error: BaseException) -> str:
        """The template's name and, where jinja2's rewritten traceback has it, the line."""
        line, frame = None, error.__traceback__
        while frame is not None:
            if frame.tb_frame.f_code.co_filename == "<template>":
                line = frame.tb_lineno
            frame = frame.tb_next
        return self.name if line is None else f"{self.name}:{line}"


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which would reach the model.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse_private_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"chat templates may not set {name!r} on a namespace")
