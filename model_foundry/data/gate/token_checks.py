"""Checks of the datums: which tokens are trained, where answers begin and end, what is doubled, cut or left out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from model_foundry.data.gate.borders import Fault, answers_of
from model_foundry.data.gate.subject import Subject
from model_foundry.data.gate.verdict import MAX_EXAMPLES, Example, GateCheck, at_most, excerpt, share_text
from model_foundry.data.rows import Row
from model_foundry.data.tokenise import RowProblem
from model_foundry.rendering.control import texts
from model_foundry.types import Datum

_QUANTILE = 0.99
_ASKS = re.compile(
    r"^\s*(?:#+ *(?:Instruction|Human|User)\b|(?:Human|User|Instruction) *:)|\[INST\]|<\|?user\|?>"
    r"|<\|im_start\|>user|<\|start_header_id\|>user|<start_of_turn>user",
    re.MULTILINE,
)
_ANSWERS = re.compile(
    r"^\s*(?:#+ *(?:Response|Assistant)\b|(?:Assistant|AI|Bot|Response) *:)|\[/INST\]"
    r"|<\|?assistant\|?>|<\|im_start\|>assistant|<\|start_header_id\|>assistant|<start_of_turn>model",
    re.MULTILINE,
)


def answers_trained(subject: Subject) -> GateCheck:
    """Something is trained in every row, and every answer that is meant to be trained is, from its beginning."""
    problems = [problem for problem in subject.problems if problem.kind == "untrained"]
    lost = [row for row in subject.data.lost if not row.is_overlong]
    faults = subject.borders.of("unanswered")
    count = len(problems) + len(lost) + len({fault.row for fault in faults})
    examples = [*_problem_examples(problems), *(Example(row.source, row.reason) for row in lost[:MAX_EXAMPLES])]
    examples += _fault_examples(subject, faults)
    share = subject.data.num_trained_tokens / max(1, subject.data.num_tokens)
    evidence = (
        f"Tokens trained: {subject.data.num_trained_tokens:,} of {subject.data.num_tokens:,} ({share_text(share)}). "
        f"Rows with nothing to train on, or with an answer that is not trained: {count:,}."
    )
    return GateCheck("answers_trained", count == 0, count, "0 rows", evidence, tuple(examples[:MAX_EXAMPLES]))


def prompts_untrained(subject: Subject) -> GateCheck:
    """Under `train_on` assistant, nothing but answers is trained."""
    bound = "0 rows"
    if subject.train_on == "all":
        return GateCheck("prompts_untrained", True, None, bound, "data.train_on is all: every token is to be trained.")
    faults = subject.borders.of("prompt")
    count = len({fault.row for fault in faults})
    if rendered := _rendered_conversations(subject):
        examples = tuple(
            Example(row.source, "a conversation as plain text", excerpt(row.text or "")) for row in rendered
        )
        evidence = (
            f"Plain texts that are conversations, whose questions are trained as well: {len(rendered):,} of "
            f"{len(subject.rendered.rows):,} rows. Give them as messages, or set data.train_on=all where that is meant."
        )
        return GateCheck("prompts_untrained", False, len(rendered), bound, evidence, examples)
    evidence = (
        f"Rows in which tokens are trained that are no answer: {count:,} (data.train_on={subject.train_on}; "
        f"{_how_many_examined(subject)})."
    )
    return GateCheck("prompts_untrained", count == 0, count, bound, evidence, _fault_examples(subject, faults))


def _rendered_conversations(subject: Subject) -> list[Row]:
    """Plain texts in which people and a model speak by turns, where at least half of the rows are such.

    Those with this tokenizer's own control tokens are for another check.
    """
    found = []
    for row in subject.rendered.rows:
        if row.text is not None and _ASKS.search(row.text) and _ANSWERS.search(row.text):
            found += [] if subject.renderer.control_tokens_in(row.text) else [row]
    return found if found and 2 * len(found) >= len(subject.rendered.rows) else []


def end_of_turn_trained(subject: Subject) -> GateCheck:
    """Every answer that is not cut off is trained to end."""
    rows = subject.data.num_rows
    faults = list(subject.borders.of("unended"))
    if faults or subject.train_on != "all":
        unended = {fault.row for fault in faults}
        examples = _fault_examples(subject, faults)
    else:
        unended, examples = set(), ()
    unended |= set(_without_stops(subject).tolist())
    if not examples and unended:
        examples = subject.examples(np.array(sorted(unended)[:MAX_EXAMPLES]), "no token that ends a turn is trained")
    stops = [repr(subject.renderer.tokenizer.decode([stop])) for stop in subject.renderer.stop_token_ids]
    evidence = f"Rows with an answer that is not trained to end: {len(unended):,} of {rows:,}."
    evidence += f" Turns end with {', '.join(stops)}." if stops else " The tokenizer has no token that ends a text."
    return GateCheck("end_of_turn_trained", not unended, len(unended), "0 rows", evidence, examples)


def _without_stops(subject: Subject) -> np.ndarray:
    """Datums whose rows are trained throughout, and that lack a trained stop token for each answer or text."""
    scan, data = subject.borders.scan, subject.data
    if not subject.renderer.stop_token_ids and all(row.text is not None for row in subject.rendered.rows):
        return np.zeros(0, dtype=np.int64)  # plain texts, and a tokenizer without an end: nothing is missing
    found = []
    for datum, index in enumerate(data.indices.tolist()):
        row = subject.rendered.rows[index]
        if row.text is None and subject.train_on != "all":
            continue
        is_cut = data.full_lengths[datum] > data.datums[datum].num_tokens + 1
        wanted = 1 if row.text is not None else len(answers_of(row, "assistant"))
        if not is_cut and scan.num_stops[datum] < wanted:
            found.append(datum)
    return np.array(found, dtype=np.int64)


def trained_as_generated(subject: Subject) -> GateCheck:
    """The tokens before an answer are those of the generation prompt, and the answer is what would be written then."""
    problems = [problem for problem in subject.problems if problem.kind == "border"]
    faults = subject.borders.of("mismatch")
    total = max(1, subject.borders.num_answers + len(problems))
    share = max((len(problems) + len(faults)) / total, subject.borders.mismatch_share)
    bound = subject.policy.max_mismatch_share
    evidence = (
        f"Answers trained with other tokens than the model meets or writes when it is asked: "
        f"{len(problems) + len(faults):,} of {subject.borders.num_answers + len(problems):,} "
        f"({_how_many_examined(subject)})."
    )
    if faults and share > bound:
        evidence += (
            " Where answers begin with white space, strip it; where the template writes earlier turns otherwise, "
            "set data.train_on=last_assistant; else choose another model.template."
        )
    examples = (*_problem_examples(problems), *_fault_examples(subject, faults))[:MAX_EXAMPLES]
    said = at_most(bound, "answers")
    return GateCheck("trained_as_generated", share <= bound, share, said, evidence, examples)


def bos_not_doubled(subject: Subject) -> GateCheck:
    """No row begins with two beginning-of-text tokens."""
    found = np.flatnonzero(subject.borders.scan.is_bos_doubled)
    evidence = f"Rows that begin with BOS twice: {found.size:,} of {len(subject.data.datums):,}."
    examples = tuple(
        subject.example(int(d), f"begins {_shown(subject, subject.data.datums[d], 0)}") for d in found[:MAX_EXAMPLES]
    )
    return GateCheck("bos_not_doubled", not found.size, int(found.size), "0 rows", evidence, examples)


def end_not_doubled(subject: Subject) -> GateCheck:
    """No turn is trained to end twice with the same token."""
    found = np.flatnonzero(subject.borders.scan.is_stop_doubled)
    evidence = f"Rows in which a turn ends with the same token twice: {found.size:,} of {len(subject.data.datums):,}."
    examples = tuple(
        subject.example(int(d), f"ends {_shown(subject, subject.data.datums[d], -5)}") for d in found[:MAX_EXAMPLES]
    )
    return GateCheck("end_not_doubled", not found.size, int(found.size), "0 rows", evidence, examples)


def control_tokens(subject: Subject) -> GateCheck:
    """People's text spells no control token. Where it does it was encoded as plain text, but it hints at a mistake.

    Tokens that the template writes, named ones (BOS, EOS, …) and everything spelt <|…|> are refused in any row. Other
    special tokens, such as <filename>, are what people also write: these may stand in a small share of the rows.
    """
    strict: list[Example] = []
    other: list[Example] = []
    counts: Counter[str] = Counter()
    for row in subject.rendered.rows:
        place = _control_place(subject, row)
        if place is None:
            continue
        token, is_strict, example = place
        counts[token] += 1
        (strict if is_strict else other).append(example)
    num_rows = max(1, len(subject.rendered.rows))
    bound = subject.policy.max_special_share
    passed = subject.policy.allow_control_tokens or (not strict and len(other) / num_rows <= bound)
    named = ", ".join(f"{token} ({count:,})" for token, count in counts.most_common(5))
    evidence = f"Rows in which people's text spells a control token: {named or 'none'}."
    if counts:
        evidence += " They were encoded as plain text"
        evidence += ", as data.allow_control_tokens allows." if subject.policy.allow_control_tokens else "."
    value = f"{len(strict):,}" + (f" + {len(other):,} other" if other else "")
    said = f"0 rows, other special tokens in {at_most(bound, 'rows')}"
    return GateCheck("control_tokens", passed, value, said, evidence, tuple([*strict, *other][:MAX_EXAMPLES]))


def rows_kept(subject: Subject) -> GateCheck:
    """Few rows are dropped or cut off for their length."""
    data, policy = subject.data, subject.policy
    cut = np.flatnonzero(data.full_lengths > data.lengths + 1)
    lost = [row for row in data.lost if row.is_overlong]
    problems = [problem for problem in subject.problems if problem.kind == "overlong"]
    num_left_out = len(lost) + len(problems)
    count = num_left_out + int(cut.size)
    share = count / max(1, data.num_rows)
    is_all = count > 0 and not data.datums
    is_judged = count >= policy.min_cases or bool(problems) or is_all
    evidence = (
        f"Rows left out for their length: {len(lost) + len(problems):,}; cut off: {cut.size:,} "
        f"(data.max_length={subject.max_length})."
    )
    if count:
        lengths = [*data.full_lengths.tolist(), *(row.num_tokens for row in (*lost, *problems))]
        most = int(np.quantile(lengths, _QUANTILE, method="higher"))
        evidence += f" data.max_length={most} would keep {share_text(_QUANTILE)} of the rows whole." if most else ""
    if count and not is_judged:
        evidence += f" Not judged when they are fewer than {policy.min_cases}."
    examples = [Example(row.source, f"left out: {row.num_tokens:,} tokens") for row in lost[:MAX_EXAMPLES]]
    examples += _problem_examples(problems)
    examples += subject.examples(cut[:MAX_EXAMPLES], "cut off")
    passed = not problems and not is_all and (share <= policy.max_lost_share or not is_judged)
    said = at_most(policy.max_lost_share, "rows")
    return GateCheck("rows_kept", passed, share, said, evidence, tuple(examples[:MAX_EXAMPLES]))


def _control_place(subject: Subject, row: Row) -> tuple[str, bool, Example] | None:
    """The first control token in a row's texts, the worst kind first; whether it is one of the worst; where it is."""
    renderer = subject.renderer
    found: tuple[str, bool, Example] | None = None
    for place, role, text in _written(row):
        for token in renderer.control_tokens_in(text, role=role):
            is_strict = _is_structural(subject, token)
            if found is None or (is_strict and not found[1]):
                example = Example(row.source, f"{place} holds {token}", excerpt(text, around=text.index(token)))
                found = (token, is_strict, example)
    return found


def _written(row: Row) -> Iterator[tuple[str, str, str]]:
    """Every text that people wrote in a row: its place, who speaks, the text."""
    if row.text is not None:
        yield "text", "user", row.text
    for index, turn in enumerate(row.messages):
        yield f"messages[{index}]", turn.role, turn.content
        for text in texts(turn.extra) if turn.extra else ():
            yield f"messages[{index}]", turn.role, text
    for text in texts(row.tools or ()):
        yield "tools", "user", text


def _is_structural(subject: Subject, token: str) -> bool:
    renderer = subject.renderer
    named = token in renderer.tokenizer.named.values() or token in renderer.template_text
    return named or token.startswith("<|") or renderer.tokenizer.special_tokens[token] in renderer.stop_token_ids


def _problem_examples(problems: Sequence[RowProblem]) -> list[Example]:
    return [Example(problem.source, problem.what) for problem in problems[:MAX_EXAMPLES]]


def _fault_examples(subject: Subject, faults: Sequence[Fault]) -> tuple[Example, ...]:
    first = list({fault.row: fault for fault in reversed(faults)}.values())[::-1][:MAX_EXAMPLES]
    return tuple(subject.example(fault.row, fault.what) for fault in first)


def _how_many_examined(subject: Subject) -> str:
    borders = subject.borders
    return (
        f"judged by their tokens: {len(subject.data.datums):,} rows, odd ones: {borders.num_suspect:,}, "
        f"rendered again: {borders.num_examined:,}"
    )


def _shown(subject: Subject, datum: Datum, start: int) -> str:
    ids = [int(datum.tokens[0]), *datum.loss_inputs["target_tokens"].tolist()]
    return repr(subject.renderer.tokenizer.decode(ids[:5] if start == 0 else ids[start:]))
