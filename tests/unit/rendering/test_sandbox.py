"""Hostile templates get an error within seconds: no shell, no endless loop, no full memory."""

from __future__ import annotations

import time
from datetime import datetime

import pytest

from model_foundry.errors import TemplateError, UnsafeTemplateError
from model_foundry.rendering.sandbox import CompiledTemplate

MESSAGES = [{"role": "user", "content": "hi"}]
DOUBLE = "{% set ns = namespace(s=START) %}{% for i in range(60) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s }}"


def run(source: str, *, max_cpu_seconds: float = 1.0) -> str:
    template = CompiledTemplate(source, name="t", now=datetime(2026, 1, 1), max_cpu_seconds=max_cpu_seconds)
    return template.render({"messages": MESSAGES}, num_input_chars=100)


def doubling(step: str, start: str = "'a'") -> str:
    return DOUBLE.replace("START", start).replace("STEP", step)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ [''] | map(attribute='__class__') | list }}",
        "{{ ['a'] | sort(attribute='__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self._TemplateReference__context }}",
        "{{ (messages | map(attribute='content')).gi_frame }}",
        "{{ namespace(__init__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'system'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ lipsum.__globals__ }}",
        "{{ [1, 2] | random }}",
    ],
)
def test_no_way_to_python_or_files(source: str) -> None:
    with pytest.raises(TemplateError):
        run(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ range(10**9) | list }}",
        "{{ 'a' * 10**10 }}",
        "{{ [1] * 10**9 }}",
        "{{ 10 ** (10**8) }}",
        doubling("ns.s + ns.s"),
        doubling("ns.s ~ ns.s"),
        doubling("ns.s | replace('a', 'aa')"),
        doubling("ns.s.replace('a', 'aa')"),
        doubling("ns.s.join(['', ns.s, ''])"),
        doubling("[ns.s, ns.s] | join(ns.s)"),
        doubling("'%s%s' % (ns.s, ns.s)"),
        doubling("'{0}{0}'.format(ns.s)"),
        doubling("[ns.s, ns.s]"),
        doubling("{'a': ns.s.items(), 'b': ns.s.items()}", "{'a': 1}"),
        doubling("dict(a=ns.s, b=ns.s)"),
        doubling("ns.s + ns.s", "['a']"),
        doubling("ns.s * ns.s", "3"),
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}"
        "{% set ns.s = x %}{% endfor %}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ (1).to_bytes(10**10, 'little') }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%(a)9999999999d' % {'a': 1} }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**9) }}",
        "{{ 'a\nb' | indent(10**10) }}",
        "{{ {'a': 1} | tojson(indent=10**10) }}",
        "{{ 1 | round(10**9, 'ceil') }}",
        "{{ [[1]] | sum(start=[]) }}",
        "{{ ''.join(range(99999) | map('string') | map('replace', '', 'x' * 200000)) }}",
        "{{ dict(*(range(99999) | map('string') | map('replace', '', 'x' * 200000))) }}",
        "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
        "{% for i in range(90000) %}{% for j in range(90000) %}" + "x" * 1000 + "{% endfor %}{% endfor %}",
    ],
)
def test_nothing_big_is_made_of_something_small(source: str) -> None:
    start = time.thread_time()
    with pytest.raises(TemplateError):
        run(source)
    assert time.thread_time() - start < 1.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{{ range(90000) | select('odd') | list | length }}{% endfor %}",
        "{% for i in range(90000) %}{{ (range(90000) | list | sort(reverse=true))[0] }}{% endfor %}",
    ],
)
def test_endless_work_ends_with_an_error(source: str) -> None:
    start = time.thread_time()
    with pytest.raises(UnsafeTemplateError, match="does not come to an end"):
        run(source, max_cpu_seconds=0.05)
    assert time.thread_time() - start < 1.5


@pytest.mark.parametrize(
    "source", ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if %}", "{{ 1 | no }}", "x" * 10**6]
)
def test_templates_that_do_not_compile_are_errors(source: str) -> None:
    with pytest.raises(TemplateError):
        run(source)


def test_errors_name_the_template_and_the_line() -> None:
    with pytest.raises(TemplateError, match=r"^t:3: "):
        run("a\nb\n{{ 1 / 0 }}")


@pytest.mark.parametrize(
    "source, expected",
    [
        ("{% for i in range(3) %}{{ i }}{% if i == 1 %}{% break %}{% endif %}{% endfor %}", "01"),
        ("{{ {'a': 'é<&'} | tojson }}", '{"a": "é<&"}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{{ '{{{}}}: {:.1f} {:,}'.format('a', 1, 1000) }} {{ '%s 2024' % 'x' }}", "{a}: 1.0 1,000 x 2024"),
        ("{{ strftime_now('%d %b %Y') }}", "01 Jan 2026"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "1"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') ~ 1 }}", "<a>1"),
        (
            "{{ messages[::-1][0]['content'] | trim | upper }}{{ messages | map(attribute='role') | join(',') }}",
            "HIuser",
        ),
        ("{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %}{{ ('a', 'b') | length }}", "x12"),
        ("  {% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb"),
        ("{{ missing }}|{{ messages[0].missing is defined }}", "|False"),
        ("{% for i in [1, 2] %}{{ loop.last }}{{ loop.length }}{% endfor %}", "False2True2"),
        ("{% for i in [1, [2, [3]]] recursive %}{{ loop(i) if i is iterable else i }}{% endfor %}", "123"),
    ],
)
def test_ordinary_templates_run_as_anywhere(source: str, expected: str) -> None:
    """The guards must not change what an honest template writes."""
    assert run(source) == expected


def test_big_conversations_are_not_taken_for_attacks() -> None:
    """Bounds grow with the input: five thousand turns of an honest template pass."""
    source = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    template = CompiledTemplate(source, name="t", now=datetime(2026, 1, 1))
    messages = [{"role": "user", "content": "x" * 100}] * 5_000
    assert len(template.render({"messages": messages}, num_input_chars=500_000)) > 500_000
