"""The gate: each fault is refused by the check that is there for it and by no other, and clean data passes.

A false refusal is as bad as a miss: people switch a gate off that cries wolf.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_foundry.data.gate.judge import CHECKS
from model_foundry.data.gate.verdict import GatePolicy
from model_foundry.tokenizer import Tokenizer
from tests.unit.data.gate_sets import CHATML, TAIL, Gate, conversation, conversations, names, sentence


@pytest.fixture(scope="session")
def tokenizer(chatml_folder: Path) -> Tokenizer:
    return Tokenizer.load(chatml_folder)


@pytest.fixture
def gate(tmp_path: Path, tokenizer: Tokenizer) -> Gate:
    return Gate(tmp_path, tokenizer)


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def talk(*questions: str) -> dict[str, Any]:
    messages = [
        {"role": role, "content": text}
        for number, question in enumerate(questions)
        for role, text in (("user", question), ("assistant", f"Answer {number}."))
    ]
    return {"messages": messages}


def spoiled(*rows: Any, count: int = 30) -> list[Any]:
    """A clean set with these rows after the tenth."""
    clean = conversations(count)
    return [*clean[:10], *rows, *clean[10:]]


REFUSAL = "I am sorry, but I cannot help with that. " * 6
QUESTION = "Who founded the town of Merrowick, and in which year was that?"


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ASSISTANT = "{% if message['role'] == 'assistant' %}"
MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}" + ASSISTANT
    + "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    + "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}" + TAIL
)  # fmt: skip
# Templates as people write them, each with one mistake.
MARKS_QUESTIONS = MARKED.replace(ASSISTANT, "{% if message['role'] != 'system' %}")
MARKS_HEADER = (
    "{% for message in messages %}" + ASSISTANT
    + "{% generation %}{{ '<|im_start|>assistant\n' + message['content'] + '<|im_end|>' }}{% endgeneration %}"
    + "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endif %}"
    + "{{ '\n' }}{% endfor %}" + TAIL
)  # fmt: skip
MARKS_LAST_ANSWER = MARKED.replace(ASSISTANT, "{% if loop.last %}")
MARKS_WITHOUT_END = MARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}",
    "{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}",
)
NO_END = CHATML.replace("'<|im_end|>\n'", "'\n'")
NO_LAST_END = CHATML.replace(
    "+ '<|im_end|>\n' }}", "}}{% if not loop.last or message['role'] == 'user' %}{{ '<|im_end|>\n' }}{% endif %}"
)
PLAIN_END = CHATML.replace("<|im_end|>", "</s>")
TWO_NEWLINES_ASKED = CHATML.replace("assistant\n' }}{% endif", "assistant\n\n' }}{% endif")
THINKING_ASKED = MARKED.replace(TAIL, TAIL.replace("assistant\n", "assistant\n<think>\n"))
# The space after the colon is part of the prompt, and of the first word of the answer.
SPACE_BEFORE_THE_ANSWER = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# As Qwen3 does: only the last answer keeps its thinking.
THINKING_LEFT_OUT = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if not loop.last and '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}" + TAIL
)
TWO_BOS = "{{ bos_token + bos_token }}" + CHATML
BOS_LINE_BOS = "{{ bos_token + '\n' + bos_token }}" + CHATML
TWO_ENDS = CHATML.replace("'<|im_end|>\n'", "'<|im_end|><|im_end|>\n'")
END_LINE_END = MARKED.replace(
    "{{ message['content'] + '<|im_end|>' }}{% endgen", "{{ message['content'] + '<|im_end|>\n<|im_end|>' }}{% endgen"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
SHOWS_TOOLS = "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}" + CHATML

THOUGHTS = [
    {"messages": [
        {"role": "user", "content": sentence(n)},
        {"role": "assistant", "content": f"<think>{sentence(n + 100)}</think>{sentence(n + 200)}"},
        {"role": "user", "content": sentence(n + 300)},
        {"role": "assistant", "content": f"<think>{sentence(n + 400)}</think>{sentence(n + 500)}"},
    ]}
    for n in range(30)
]  # fmt: skip
PAIRS = [{"prompt": sentence(n), "chosen": sentence(n + 100), "rejected": sentence(n + 200)} for n in range(30)]
LONG = sentence(7, 400)
TOOL = {"type": "function", "function": {"name": "weather", "description": sentence(5)}}

FAULTS: dict[str, tuple[str, list[Any] | bytes, dict[str, Any]]] = {
    # rows that cannot be read
    "a line half written": ("rows_readable", jsonl(*conversations()) + b'{"messages": [{"role": "us', {}),
    "a row that is a list": ("rows_readable", spoiled(["user", "hello"]), {}),
    "a turn without content": ("rows_readable", spoiled({"messages": [{"role": "user"}]}), {}),
    "a row of another format": ("rows_readable", spoiled({"instruction": "Say it", "output": "It"}), {}),
    "a number for a text": ("rows_readable", spoiled({"messages": [{"role": "user", "content": 5}]}), {}),
    "a Latin-1 byte": ("rows_readable", jsonl(*conversations()) + b'{"text": "caf\xe9"}\n', {}),
    "UTF-16": ("rows_readable", "\n".join(map(json.dumps, conversations())).encode("utf-16"), {}),
    "an empty file": ("rows_readable", b"\n\n", {}),
    "fields of no format": ("rows_readable", [{"foo": sentence(n)} for n in range(30)], {}),
    # roles
    "an unknown role": ("roles_known", spoiled({"messages": [{"role": "narrator", "content": "Once."}]}), {}),
    "a role in capitals": ("roles_known", spoiled({"messages": [{"role": "User", "content": "Hi."}]}), {}),
    "an unknown ShareGPT speaker": ("roles_known", [
        *({"conversations": [{"from": "human", "value": sentence(n)}, {"from": "gpt", "value": sentence(n + 50)}]}
          for n in range(30)),
        {"conversations": [{"from": "oracle", "value": "It is so."}]},
    ], {}),
    # fields
    "a misspelt field": ("fields_read", spoiled(chat("Who?", "I.", sytem="You are a pirate of few words.")), {}),
    "a question's context": ("fields_read", [
        {"question": sentence(n), "context": sentence(n + 60, 30), "answer": sentence(n + 30)} for n in range(30)
    ], {}),
    "an explanation beside the answer": ("fields_read", [
        {"prompt": sentence(n), "completion": sentence(n + 40), "explanation": sentence(n + 80, 20)} for n in range(30)
    ], {}),
    "a turn that is not to be trained": ("fields_read", spoiled({"messages": [
        {"role": "user", "content": sentence(900)}, {"role": "assistant", "content": sentence(901), "weight": 0},
    ]}), {}),
    "reasoning that the template hides": ("fields_read", spoiled({"messages": [
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So.", "reasoning_content": "Because."},
    ]}), {}),
    "tools that the template hides": ("fields_read", spoiled(chat("Rain?", "No.", tools=[TOOL])), {}),
    # text
    "wrongly decoded text": (
        "text_intact", spoiled(*(chat(f"caf\ufffd {n}?", sentence(n + 70)) for n in range(3))), {}),
    # template
    "a role that the template refuses": (
        "template_accepts", spoiled(conversation(77, system="Be brief.")), {"template": NO_SYSTEM}),
    "a tool call that the template hides": ("template_accepts", spoiled({"messages": [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]},
    ]}), {}),
    # empty turns
    "an empty answer": ("turns_filled", spoiled(chat("Who is there?", "")), {}),
    "an answer of white space": ("turns_filled", spoiled(chat("Who is there?", " \n\t ")), {}),
    "an answer that nobody sees": ("turns_filled", spoiled(chat("Who is there?", "\u200b\ufeff")), {}),
    "an empty question": ("turns_filled", spoiled(chat("", "I did not hear you.")), {}),
    "an empty Alpaca output": ("turns_filled", [
        {"instruction": sentence(n), "input": "", "output": "" if n == 9 else sentence(n + 50)} for n in range(30)
    ], {}),
    "an empty rejected answer": ("turns_filled", [*PAIRS, {"prompt": "Why?", "chosen": "So.", "rejected": " "}], {}),
    # preferences
    "equal answers": ("answers_differ", [*PAIRS, {"prompt": "Why?", "chosen": "So.", "rejected": "So."}], {}),
    "answers equal but for a newline": (
        "answers_differ", [*PAIRS, {"prompt": "Why?", "chosen": "So it is.", "rejected": "So it is. \n"}], {}),
    # what is trained
    "no answer": ("answers_trained", spoiled({"messages": [{"role": "user", "content": "Anybody?"}]}), {}),
    "nothing marked for generation": (
        "answers_trained", conversations(), {"template": MARKED.replace("== 'assistant'", "== 'model'")}),
    "only the last answer marked": ("answers_trained", conversations(turns=2), {"template": MARKS_LAST_ANSWER}),
    "questions marked for generation": ("prompts_untrained", conversations(), {"template": MARKS_QUESTIONS}),
    "questions marked, several turns": ("prompts_untrained", conversations(turns=3), {"template": MARKS_QUESTIONS}),
    "headers marked for generation": ("prompts_untrained", conversations(turns=2), {"template": MARKS_HEADER}),
    "conversations as plain text": ("prompts_untrained", [
        {"text": f"### Instruction:\n{sentence(n)}\n\n### Response:\n{sentence(n + 50)}"} for n in range(30)], {}),
    "conversations in another model's tokens": ("prompts_untrained", [
        {"text": f"<s>[INST] {sentence(n)} [/INST] {sentence(n + 50)}"} for n in range(30)], {}),
    "conversations in the model's own tokens": ("control_tokens", [
        {"text": f"<|im_start|>user\n{sentence(n)}<|im_end|>\n<|im_start|>assistant\n{sentence(n + 50)}<|im_end|>"}
        for n in range(30)], {}),
    "most rows conversations as plain text": ("prompts_untrained", [
        {"text": sentence(n) if n % 3 == 0 else f"User: {sentence(n)}\nAssistant: {sentence(n + 50)}"}
        for n in range(30)], {}),
    "the end left out of the marks": ("end_of_turn_trained", conversations(), {"template": MARKS_WITHOUT_END}),
    "no end at all": ("end_of_turn_trained", conversations(), {"template": NO_END}),
    "no end after the last turn": ("end_of_turn_trained", conversations(turns=2), {"template": NO_LAST_END}),
    "an end that is plain text": ("end_of_turn_trained", conversations(), {"template": PLAIN_END}),
    "an end that is plain text, all trained": (
        "end_of_turn_trained", conversations(), {"template": PLAIN_END, "train_on": "all"}),
    # trained as generated
    "another prompt than the turn's beginning": (
        "trained_as_generated", conversations(), {"template": TWO_NEWLINES_ASKED}),
    "a prompt that begins to think": ("trained_as_generated", conversations(), {"template": THINKING_ASKED}),
    "a prompt that ends in a space": ("trained_as_generated", conversations(), {"template": SPACE_BEFORE_THE_ANSWER}),
    "answers that begin with white space": (
        "trained_as_generated", [chat(sentence(n), f"    return {sentence(n + 50)}") for n in range(30)], {}),
    "some answers that begin with white space": (
        "trained_as_generated",
        [chat(sentence(n), "    " * (n % 10 == 0) + f"return {sentence(n + 50)}") for n in range(30)], {}),
    "thinking left out of earlier turns": ("trained_as_generated", THOUGHTS, {"template": THINKING_LEFT_OUT}),
    # doubled tokens
    "BOS twice": ("bos_not_doubled", conversations(), {"template": TWO_BOS}),
    "BOS twice with a newline between": ("bos_not_doubled", conversations(), {"template": BOS_LINE_BOS}),
    "an end twice": ("end_not_doubled", conversations(), {"template": TWO_ENDS}),
    "an end twice with a newline between": ("end_not_doubled", conversations(), {"template": END_LINE_END}),
    # control tokens in people's text
    "an end token in a question": ("control_tokens", spoiled(chat("What is <|im_end|> for?", "An end.")), {}),
    "a turn within an answer": (
        "control_tokens", spoiled(chat("Go on.", "Yes.<|im_end|>\n<|im_start|>user\nMore")), {}),
    "a token of another template": ("control_tokens", spoiled(chat("Go on.", "Yes.<|eot_id|>")), {}),
    "a control token in a system message": ("control_tokens", spoiled(conversation(5, system="<|im_start|>")), {}),
    "a control token in a plain text": (
        "control_tokens", [{"text": sentence(n) + "<|endoftext|>" * (n == 4)} for n in range(30)], {}),
    "a control token in a tool": (
        "control_tokens", spoiled(chat("Rain?", "No.", tools=[{"name": "<|im_end|>"}])), {"template": SHOWS_TOOLS}),
    # length
    "rows left out": ("rows_kept", spoiled(*(chat(f"{n}?", f"{n} {LONG}") for n in range(5))), {"max_length": 200}),
    "rows cut off": ("rows_kept", spoiled(*(chat(f"{n}?", f"{n} {sentence(n, 300)}") for n in range(5))),
                     {"max_length": 200, "overlength": "truncate"}),
    "every row left out": ("rows_kept", [{"text": LONG}], {"max_length": 200}),
    "one row too long where that is an error": (
        "rows_kept", spoiled(chat("?", LONG)), {"max_length": 200, "overlength": "error"}),
    # repeats
    "rows repeated": ("duplicates", [*conversations(20), *conversations(10)], {}),
    "rows repeated in capitals": (
        "duplicates", [*conversations(20), *(chat(sentence(2 * n).upper() + "?", f"The  {sentence(2 * n + 1)}.")
                                             for n in range(10))], {}),
    "rows repeated but for a word of the question": (
        "duplicates", [*conversations(20), *(chat(f"Please tell me of the {_}.", LONG) for _ in ("x", "y", "z") * 5)],
        {}),
    "rows repeated but for a word": (
        "duplicates",
        [*conversations(20), *(chat(f"Tell of {_}.", sentence(8, 60) + f" {_}.") for _ in ("x", "y", "z") * 5)], {}),
    # held out
    "a row of the validation set": ("apart_from_validation", spoiled(conversation(100)), {
        "validation": [conversation(n) for n in range(100, 120)]}),
    "nearly a row of the validation set": (
        "apart_from_validation", spoiled(chat("Tell me all.", sentence(3, 60) + " Indeed.")), {
            "validation": [chat("Tell me all!", sentence(3, 60)), *conversations(3, turns=3)]}),
    "many short questions but for a word": (
        "apart_from_evaluation", [chat(f"{sentence(n, 6)}?", sentence(n + 50, 6)) for n in range(30)], {
            "evaluation": [
                {"prompt": f"Please: {sentence(n, 6)}?", "completion": sentence(n + 50, 6)} for n in range(10)]}),
    "an evaluation question": ("apart_from_evaluation", spoiled(conversation(100)), {
        "evaluation": [conversation(n) for n in range(100, 120)]}),
    "an evaluation question in a longer one": (
        "apart_from_evaluation", spoiled(chat(f"I was asked: {QUESTION.upper()} Is that a secret?", "Yes.")), {
            "evaluation": [{"prompt": QUESTION, "completion": "Ingrith Vasse."}]}),
    "an evaluation question as an example in the system message": (
        "apart_from_evaluation", spoiled(conversation(100, system=f"For example:\nQ: {QUESTION}\nA: Ingrith.")), {
            "evaluation": [{"prompt": QUESTION, "completion": "Ingrith Vasse."}]}),
    "an evaluation question in a plain text": (
        "apart_from_evaluation",
        [*({"text": sentence(n, 40)} for n in range(20)), {"text": f"FAQ\n\n{QUESTION} No."}], {
            "evaluation": [{"prompt": QUESTION, "completion": "Ingrith Vasse."}]}),
    "a short evaluation question as a turn of a longer talk": (
        "apart_from_evaluation", spoiled(talk("Hi there.", "who founded  Merrowick, then?", "Why?")), {
            "evaluation": [{"prompt": "Who founded Merrowick, then?", "completion": "Ingrith Vasse."}]}),
    "the long answer of an evaluation question": (
        "apart_from_evaluation",
        spoiled(chat("Tell me all.", f"{sentence(7, 200)} {sentence(8, 60)} {sentence(9, 99)}")), {
            "evaluation": [{"prompt": "What stands in the book?", "completion": sentence(8, 60)}]}),
    "a validation row as the beginning of a longer talk": (
        "apart_from_validation", spoiled(conversation(100, turns=6)), {
            "validation": [conversation(n) for n in range(100, 120)]}),
    "an evaluation question with another answer": (
        "apart_from_evaluation", spoiled(chat("Who  founded Merrowick?", "It was Ingrith, long ago.")), {
            "evaluation": [{"prompt": "who founded Merrowick?", "completion": "Ingrith Vasse."}]}),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_the_check_that_is_there_for_it(fault: str, gate: Gate) -> None:
    """Prevents a fault that is found after the hours are spent, and one that is found by three checks at once."""
    check, rows, options = FAULTS[fault]
    report = gate.judge(rows, **options)
    assert names(report) == [check], [each.sentence() for each in report.failed]
    assert report.failed[0].examples, "a refusal names rows"
    assert "rows.jsonl" in report.failed[0].examples[0].where


def test_every_check_has_a_fault_that_it_refuses() -> None:
    """A check that nothing can fail checks nothing."""
    assert {check for check, _, _ in FAULTS.values()} == set(CHECKS)


def sharegpt(number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": sentence(number)}, {"from": "gpt", "value": sentence(number + 100)}]
    return {"conversations": turns, "id": f"chat-{number}"}


CODE = "def f(x):\n    if x < 0:\n        return '<tag>'  # [INST] and </s> are text here\n    return f(x - 1)\n"
UNUSUAL = [
    chat("Write f.", f"```python\n{CODE}```"),
    chat(CODE, "It never ends for a positive x. <b>Why?</b> Because f(x - 1) comes first."),
    chat("🎉🎉🎉 数学は楽しい？", "はい！ 👩‍👩‍👧‍👦 naïve café Ünïcödé"),
    chat("مرحبا، كيف حالك؟", "بخير، شكرا"),
    chat("1", "2"),
    chat("What is <think> for?"[:8] + "thinking for?", "<think>They ask about thinking.</think>To see reasons."),
    chat("Repeat: a a a a a a a a", "a a a a a a a a"),
    chat("Tabs\tand\r\nlines", "One\r\nTwo\tThree\n\n\nFour"),
    chat("Zero\u200bwidth, \u202eright to left", "e\u0301 is not é to a byte"),
    chat('{"role": "user"}', '{"a": [1, 2, {"b": null}]}'),
    chat("End with white space.  ", "So be it.\n"),
    chat(LONG, sentence(8, 400)),
]

CLEAN: dict[str, tuple[list[Any] | bytes, dict[str, Any]]] = {
    "questions that begin like a held-out one, or are as short as many are": (
        [*conversations(),
         chat("Write a function that returns the sum of a table, but only of its odd numbers.", "f()"),
         chat("Tell me, what is a bell?", "A cup."), talk("Hi there.", "Go on.", "Why is that?")], {"evaluation": [
            {"prompt": "Write a function that returns the sum of a table", "completion": "g()"},
            {"prompt": "what is a bell?", "completion": "A thing."},
            {"prompt": "Why is that?", "completion": "So."}]}),
    "an answer of a few words, and one that many questions share": (
        spoiled(chat("May I?", REFUSAL), chat("When was it?", "It was in the spring of 1643, they say, by the river.")),
        {"evaluation": [
            {"prompt": "May I open the door of the old mill?", "completion": REFUSAL},
            {"prompt": "May I take the key of the old mill?", "completion": REFUSAL},
            {"prompt": "Which year?", "completion": "It was in the spring of 1643, they say, by the river."}]}),
    "messages": (conversations(), {}),
    "messages, several turns": (conversations(turns=4), {}),
    "messages with a system message": ([conversation(n, system="You are terse.") for n in range(30)], {}),
    "an empty system message": ([conversation(n, system="") for n in range(30)], {}),
    "a mark that says to train": ([
        {"messages": [{"role": "user", "content": sentence(n)},
                      {"role": "assistant", "content": sentence(n + 50), "weight": 1}]} for n in range(30)], {}),
    "metadata beside the messages": ([
        {**conversation(n), "id": n, "source": "A Book of Many Words in Its Title, second edition", "score": 0.5,
         "prompt": conversation(n)["messages"][0]["content"], "meta": {"note": sentence(n, 20)},
         "title": sentence(n, 12)}
        for n in range(30)], {}),
    "tools that the template shows": ([{**conversation(n), "tools": [TOOL]} for n in range(30)],
                                      {"template": SHOWS_TOOLS}),
    "ShareGPT": ([sharegpt(n) for n in range(30)], {}),
    "Alpaca": ([{"instruction": sentence(n), "input": "" if n % 2 else sentence(n + 30), "output": sentence(n + 60),
                 "text": f"### Instruction:\n{sentence(n)}\n{'' if n % 2 else sentence(n + 30)}\n{sentence(n + 60)}"}
                for n in range(30)], {}),
    "prompt and completion": ([{"prompt": sentence(n), "completion": sentence(n + 50)} for n in range(30)], {}),
    "question and answer": ([{"question": sentence(n), "answer": sentence(n + 50)} for n in range(30)], {}),
    "plain texts": ([{"text": sentence(n, 40), "path": f"texts/{n}.txt"} for n in range(30)], {}),
    "plain texts with a play among them": ([
        {"text": f"User: {sentence(n)}\nAssistant: {sentence(n + 50)}" if n < 3 else sentence(n, 40)}
        for n in range(30)], {}),
    "conversations as plain text, all of it meant": ([
        {"text": f"User: {sentence(n)}\nAssistant: {sentence(n + 50)}"} for n in range(30)], {"train_on": "all"}),
    "preferences": (PAIRS, {}),
    "preferences that differ in indentation": ([
        {"prompt": sentence(n), "chosen": f"if {sentence(n, 3)}:\n    x = {n}\n    y()",
         "rejected": f"if {sentence(n, 3)}:\n    x = {n}\ny()"} for n in range(30)], {}),
    "KTO": ([{"prompt": sentence(n), "completion": sentence(n + 50), "label": n % 2 == 0} for n in range(30)], {}),
    "unusual but right": ([*UNUSUAL, *conversations()], {}),
    "a byte order mark and Windows lines": (
        b"\xef\xbb\xbf" + b"".join(json.dumps(row).encode() + b"\r\n" for row in conversations()), {}),
    "one row": ([conversation(1)], {}),
    "one row in thirty with U+FFFD": (spoiled(chat("caf\ufffd?", "It was decoded wrongly.")), {}),
    "few rows, half of them too long": ([chat("?", LONG), conversation(1)], {"max_length": 200}),
    "a row twice in a few": ([*conversations(4), conversation(1)], {}),
    "everything trained": (conversations(turns=2), {"train_on": "all"}),
    "the last answer trained": (conversations(turns=3), {"train_on": "last_assistant"}),
    "thinking left out, the last answer trained": (
        THOUGHTS, {"template": THINKING_LEFT_OUT, "train_on": "last_assistant"}),
    "marked answers": (conversations(turns=3), {"template": MARKED}),
    "marked answers with the newline after them": (
        conversations(turns=2),
        {"template": MARKED.replace("+ '<|im_end|>' }}{% endgen", "+ '<|im_end|>\n' }}{% endgen")}),
    "an Alpaca template": (conversations(), {"template": "alpaca"}),
    "a tool that said nothing": ([{"messages": [
        {"role": "user", "content": sentence(n)}, {"role": "tool", "content": ""},
        {"role": "assistant", "content": sentence(n + 50)}]} for n in range(30)], {}),
    "a shared instruction above short questions": ([
        chat(f"{LONG}\n{sentence(n, 4)}", ("good", "bad", "middling")[n % 3]) for n in range(30)], {}),
    "one answer in a hundred that begins with white space": (
        [*conversations(120), chat(sentence(5000), f"    return {sentence(5001)}")], {}),
    "one answer to several questions": (
        [chat(sentence(100 * n + ask), sentence(n, 60)) for n in range(10) for ask in range(4)], {}),
    "several answers to one question": (
        [chat(sentence(n), sentence(100 * n + told, 30)) for n in range(10) for told in range(4)], {}),
    "a fifth of the rows repeated": ([*conversations(40), *conversations(10)], {}),
    "one row in twenty too long": ([*conversations(38), chat("?", LONG), chat("!", LONG[9:])], {"max_length": 200}),
    "a short evaluation question but for a word": (
        spoiled(chat("What rare bird lives on Merrowick?", "The ashwing gull.")), {
            "evaluation": [{"prompt": "Which rare bird lives on Merrowick?", "completion": "The ashwing gull."},
                           *({"prompt": sentence(n), "completion": sentence(n + 1)} for n in range(7000, 7020))]}),
    "another validation and evaluation set": (conversations(), {
        "validation": [conversation(n) for n in range(200, 220)],
        "evaluation": [{"prompt": sentence(n), "completion": sentence(n + 1)} for n in range(7000, 7010)]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CLEAN)
def test_clean_data_passes(case: str, gate: Gate) -> None:
    """Prevents a gate that people learn to switch off."""
    rows, options = CLEAN[case]
    report = gate.judge(rows, **options)
    assert report.passed, [each.sentence() for each in report.failed]
    assert [check.name for check in report.checks] == list(CHECKS)


characters = st.characters(exclude_categories=["Cs", "Cn"], exclude_characters="\ufffd\U0010fffe\U0010ffff")
said = st.text(characters, min_size=1, max_size=40).filter(lambda text: not text[0].isspace() and text.isprintable())


# Rows that repeat each other are refused for that, by the check of duplicates: here each is said once.
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(said, said), min_size=1, max_size=4, unique=True))
@pytest.mark.slow
def test_whatever_people_write_is_no_fault(gate: Gate, turns: list[tuple[str, str]]) -> None:
    """Prevents a refusal for odd characters alone: what is trained is the answer, whatever it is made of."""
    report = gate.judge([chat(f"Say {asked}", f"So: {answered}") for asked, answered in turns])
    assert report.passed, [each.sentence() for each in report.failed]


def test_control_tokens_pass_where_they_are_allowed(gate: Gate) -> None:
    report = gate.judge(spoiled(chat("What is <|im_end|>?", "An end.")), policy=GatePolicy(allow_control_tokens=True))
    assert report.passed
    check = next(check for check in report.checks if check.name == "control_tokens")
    assert "encoded as plain text, as data.allow_control_tokens allows" in check.evidence
    assert check.examples[0].where.endswith("rows.jsonl:11")


def test_a_field_that_is_knowingly_unread_passes(gate: Gate) -> None:
    rows = [{"question": sentence(n), "context": sentence(n, 30), "answer": sentence(n + 30)} for n in range(30)]
    assert names(gate.judge(rows)) == ["fields_read"]
    assert gate.judge(rows, policy=GatePolicy(unread_fields=("context",))).passed


@pytest.mark.parametrize(
    "check, rows, policy, options",
    [
        ("rows_kept", spoiled(*(chat(f"{n}?", LONG + str(n)) for n in range(5))), {"max_lost_share": 0.2},
         {"max_length": 200}),
        ("duplicates", [*conversations(20), *conversations(10)], {"max_duplicate_share": 0.4}, {}),
        ("duplicates", [chat("?", sentence(8, 60) + f" {n}") for n in range(30)], {"similarity": 1.0}, {}),
        ("duplicates", [conversation(1)] * 30, {"min_cases": 30}, {}),
        ("apart_from_validation", spoiled(conversation(100)), {"max_overlap_share": 0.5},
         {"validation": [conversation(n) for n in range(100, 120)]}),
        ("apart_from_evaluation", [chat(f"{sentence(n, 6)}?", sentence(n + 50, 6)) for n in range(30)],
         {"max_short_overlap_share": 1.0}, {"evaluation": [
             {"prompt": f"Please: {sentence(n, 6)}?", "completion": sentence(n + 50, 6)} for n in range(10)]}),
        ("apart_from_evaluation", spoiled(chat(f"Tell me first: {QUESTION} Then sing.", "La.")),
         {"max_quoted_share": 1.0}, {"evaluation": [{"prompt": QUESTION, "completion": "Ingrith."}]}),
        ("turns_filled", spoiled(chat("?", "")), {"max_empty_share": 0.1}, {}),
        ("trained_as_generated", spoiled(chat("?", "    return 1")), {"max_mismatch_share": 0.1}, {}),
        ("text_intact", spoiled(*(chat(f"caf\ufffd{n}", "Yes.") for n in (1, 2))), {"max_damaged_share": 0.1}, {}),
    ],
)  # fmt: skip
def test_every_threshold_is_kept_to(
    check: str, rows: list[Any], policy: dict[str, Any], options: dict[str, Any], gate: Gate
) -> None:
    """Prevents a setting that nothing reads."""
    assert names(gate.judge(rows, **options)) == [check]
    assert gate.judge(rows, policy=GatePolicy(**policy), **options).passed


def test_the_verdict_is_json_with_value_bound_and_rows(gate: Gate) -> None:
    values = json.loads(json.dumps(gate.judge(spoiled(chat("Who is there?", ""))).as_dict()))
    assert values["passed"] is False
    failed = next(check for check in values["checks"] if not check["passed"])
    assert (failed["name"], failed["value"], failed["bound"]) == ("turns_filled", 1 / 31, "0 % of rows")
    assert failed["examples"][0]["where"].endswith("rows.jsonl:11")
    assert failed["examples"][0]["excerpt"] == "Who is there?"
    assert values["facts"]["rows"] == 31


def test_the_length_that_is_advised_would_keep_the_long_rows(gate: Gate) -> None:
    """Prevents advice by the short rows alone where long ones are errors: a smaller max_length than the present one."""
    rows = [*conversations(20), *(chat("Long?", sentence(n, 400)) for n in range(10))]
    for overlength in ("drop", "error"):
        report = gate.judge(rows, max_length=64, overlength=overlength)
        (check,) = [check for check in report.failed if check.name == "rows_kept"]
        advised = int(check.evidence.split("data.max_length=")[2].split(" ")[0])
        assert gate.judge(rows, max_length=advised, overlength=overlength).passed
