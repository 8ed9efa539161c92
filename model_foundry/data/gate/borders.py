"""Where answers begin and end: whether what is trained is what the model would have to write after the prompt.

For an answer, the tokens before it must be those of the generation prompt, one by one, or the model is trained to go on
from something that it never sees; nothing before it may be trained, its first token must be, and a stop token must end
it. Every row is judged by its tokens alone (`scan`); what looks odd, and a sample of the rest, is rendered again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from model_foundry.data.gate.scan import Scan, scan
from model_foundry.data.rows import Row
from model_foundry.data.tokenise import TokenisedSet, TrainOn
from model_foundry.errors import DataError
from model_foundry.rendering import Renderer
from model_foundry.types import Datum, Message

FaultKind = Literal["mismatch", "prompt", "unanswered", "unended"]
MAX_SAMPLED, MAX_SAMPLED_TOKENS = 400, 1_000_000
MAX_SUSPECTS, MAX_SUSPECT_TOKENS = 4000, 4_000_000
PROMPT_END_TOKENS = 8
_GOLDEN = 0.6180339887498949
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True, slots=True)
class Fault:
    """One answer that is not trained as it should be. `row` is the datum's index."""

    row: int
    kind: FaultKind
    what: str


@dataclass(frozen=True, slots=True)
class Borders:
    """What was found.

    Attributes:
        scan: the facts by datum.
        num_answers: answers in all rows.
        num_suspect: rows that looked odd.
        num_examined: rows that were rendered again, the sample included.
        faults: one or more for each examined row that is wrong.
        sampled_mismatch_share: wrong answers among those of the even sample.
    """

    scan: Scan
    num_answers: int
    num_suspect: int
    num_examined: int
    faults: tuple[Fault, ...]
    sampled_mismatch_share: float

    def of(self, *kinds: FaultKind) -> list[Fault]:
        return [fault for fault in self.faults if fault.kind in kinds]

    @property
    def mismatch_share(self) -> float:
        """Share of answers whose tokens are not what would be generated; the sample stands for rows not examined."""
        return max(len(self.of("mismatch")) / max(1, self.num_answers), self.sampled_mismatch_share)


def find_borders(rows: Sequence[Row], data: TokenisedSet, renderer: Renderer, *, train_on: TrainOn) -> Borders:
    """Look at every datum's answers.

    Args:
        rows: the rows that `data.indices` means.
    """
    is_truncated = data.full_lengths > data.lengths + 1
    of_datum = [rows[index] for index in data.indices.tolist()]
    judged = np.array([train_on != "all" and row.text is None for row in of_datum], dtype=bool)
    expected = np.array([len(answers_of(row, train_on)) for row in of_datum], dtype=np.int64)
    examiner = _Examiner(renderer, train_on)

    def examine(candidates: np.ndarray, most: int, most_tokens: int) -> np.ndarray:
        """Render candidates again, evenly spread, until there are enough; those that were."""
        order = candidates[np.argsort(np.arange(candidates.size) * _GOLDEN % 1.0, kind="stable")]
        # Each answer's prompt is encoded anew.
        costs = np.cumsum(data.lengths[order] * np.maximum(expected[order], 1)) if order.size else order
        done = order[: max(1, int(np.searchsorted(costs, most_tokens)))][:most]
        for datum in done.tolist():
            examiner.examine(datum, of_datum[datum], data.datums[datum], is_cut=bool(is_truncated[datum]))
        return done

    sample = examine(np.flatnonzero(judged), MAX_SAMPLED, MAX_SAMPLED_TOKENS)
    sampled_answers = int(expected[sample].sum())
    sampled_share = sum(fault.kind == "mismatch" for fault in examiner.faults) / max(1, sampled_answers)
    facts = scan(
        data.datums,
        is_truncated=is_truncated,
        stops=renderer.stop_token_ids,
        bos=renderer.tokenizer.bos_id,
        blanks=blank_tokens(renderer),
        prompt_end=examiner.prompt_end(),
    )
    odd_count = np.where(is_truncated, facts.num_runs > expected, facts.num_runs != expected)
    hides_thinking = np.array([_thinks_early(row) for row in of_datum], dtype=bool)
    suspect = judged & (odd_count | ~facts.starts_as_expected | ~facts.ends_in_stop | hides_thinking)
    suspects = np.flatnonzero(suspect)
    left = examine(np.setdiff1d(suspects, sample), MAX_SUSPECTS, MAX_SUSPECT_TOKENS)
    return Borders(
        scan=facts,
        num_answers=int(expected[judged].sum()),
        num_suspect=int(suspects.size),
        num_examined=int(sample.size + left.size),
        faults=tuple(sorted(examiner.faults, key=lambda fault: fault.row)),
        sampled_mismatch_share=sampled_share,
    )


def answers_of(row: Row, train_on: TrainOn) -> list[int]:
    """Indices of the messages whose tokens are meant to be trained."""
    answers = [index for index, message in enumerate(row.messages) if message.role == "assistant"]
    return answers[-1:] if train_on == "last_assistant" else answers


def blank_tokens(renderer: Renderer) -> list[int]:
    """Tokens that are white space, as templates write it between turns."""
    encoded = [renderer.tokenizer.encode(text) for text in ("\n", "\n\n", " ", "\t", "\r\n")]
    return [ids[0] for ids in encoded if len(ids) == 1]


def _thinks_early(row: Row) -> bool:
    """Whether an answer before the last shows its reasoning, which some templates then leave out."""
    answers = [message for message in row.messages if message.role == "assistant"][:-1]
    return any("</think>" in answer.content or _reasons(answer) for answer in answers)


def _reasons(message: Message) -> bool:
    return any(message.extra.get(name) for name in REASONING_FIELDS)


class _Examiner:
    """Renders rows again, prompt by prompt, and compares token by token."""

    def __init__(self, renderer: Renderer, train_on: TrainOn) -> None:
        self.faults: list[Fault] = []
        self._renderer = renderer
        self._train_on: TrainOn = train_on
        self._stops = set(renderer.stop_token_ids)
        self._blanks = set(blank_tokens(renderer))
        self._ends: list[list[int]] = []

    def prompt_end(self) -> list[int]:
        """The tokens that every generation prompt met so far ends with."""
        if not self._ends:
            return []
        common = 0
        shortest = min(map(len, self._ends))
        while common < shortest and len({end[-1 - common] for end in self._ends}) == 1:
            common += 1
        return self._ends[0][len(self._ends[0]) - common :]

    def examine(self, number: int, row: Row, datum: Datum, *, is_cut: bool) -> None:
        """Judge every answer of a row; the first mismatch ends it, for what follows has no place to be compared at."""
        ids = np.concatenate((datum.tokens[:1], datum.loss_inputs["target_tokens"]))
        trained = np.concatenate(([False], datum.loss_inputs["weights"] > 0))
        done = 0
        for index in answers_of(row, self._train_on):
            try:
                prompt = self._renderer.prompt(row.messages[:index], tools=row.tools)
            except DataError as error:
                if index and row.messages[index - 1].role != "assistant":
                    self._add(number, "mismatch", index, f"its prompt cannot be written ({error.what})")
                continue
            start = len(prompt)
            if is_cut and start >= len(ids):
                return
            what = self._mismatch(ids, prompt) or self._trained_otherwise(row, index, ids, start, is_cut=is_cut)
            if what is not None:
                self._add(number, "mismatch", index, what)
                return
            self._ends.append(prompt[-PROMPT_END_TOKENS:].tolist())
            self._judge_prompt(number, index, ids, trained, done, start)
            done = self._judge_answer(number, index, ids, trained, start, is_cut=is_cut)
        self._judge_prompt(number, len(row.messages) - 1, ids, trained, done, len(ids))

    def _judge_prompt(
        self, number: int, index: int, ids: np.ndarray, trained: np.ndarray, start: int, end: int
    ) -> None:
        """Nothing between two answers is trained."""
        if trained[start:end].any():
            place = start + int(np.argmax(trained[start:end]))
            self._add(number, "prompt", index, f"{self._shown(ids[place : place + 6])} before it is trained")

    def _judge_answer(
        self, number: int, index: int, ids: np.ndarray, trained: np.ndarray, start: int, *, is_cut: bool
    ) -> int:
        """The answer is trained from its first token to a stop token; where it ends."""
        if start >= len(ids) or not trained[start]:
            self._add(number, "unanswered", index, "its beginning is not trained")
            return start
        stretch = trained[start:]
        end = start + (int(np.argmin(stretch)) if not stretch.all() else stretch.size)
        stop = next((place for place in range(start, end) if int(ids[place]) in self._stops), None)
        if stop is not None:
            # What a template writes after it, white space or a second stop token, is trained at no harm.
            end = stop + 1
            while end < len(ids) and trained[end] and (int(ids[end]) in self._stops or int(ids[end]) in self._blanks):
                end += 1
        elif not (is_cut and end == len(ids)):
            last = self._shown(ids[max(start, end - 4) : end])
            self._add(number, "unended", index, f"it is trained up to {last}, without a token that ends it")
        return end

    def _add(self, number: int, kind: FaultKind, index: int, what: str) -> None:
        self.faults.append(Fault(number, kind, f"messages[{index}]: {what}"))

    def _mismatch(self, ids: np.ndarray, prompt: np.ndarray) -> str | None:
        length = min(len(ids), len(prompt))
        differs = np.flatnonzero(ids[:length] != prompt[:length])
        if not differs.size and len(prompt) <= len(ids):
            return None
        place = int(differs[0]) if differs.size else length
        asked, trained = self._shown(prompt[place : place + 4]), self._shown(ids[place : place + 4])
        return f"the prompt goes on {asked} where the row trained has {trained}"

    def _trained_otherwise(self, row: Row, index: int, ids: np.ndarray, start: int, *, is_cut: bool) -> str | None:
        """An earlier answer that the template writes otherwise than it does when it is the last one."""
        if is_cut or not any(message.role == "assistant" for message in row.messages[index + 1 :]):
            return None
        try:
            alone = self._renderer.render(row.messages[: index + 1], train_on="last_assistant", tools=row.tools)
        except DataError:
            return None
        answer = alone.tokens[start : int(np.flatnonzero(alone.weights)[-1]) + 1] if alone.weights.any() else ids[:0]
        found = ids[start : start + len(answer)]
        if np.array_equal(answer, found):
            return None
        length = min(len(answer), len(found))
        differs = np.flatnonzero(answer[:length] != found[:length])
        place = int(differs[0]) if differs.size else length
        return (
            f"as the last turn it is written {self._shown(answer[place : place + 4])}, "
            f"in the row {self._shown(found[place : place + 4])}"
        )

    def _shown(self, ids: np.ndarray) -> str:
        return repr(self._renderer.tokenizer.decode(ids.tolist()))
