"""Questions are read or named; answers come back in order, greedy, whatever the batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from model_foundry.errors import DataError, EngineError
from model_foundry.evals.generation import Question, answer_questions, read_questions
from model_foundry.types import Message, SampledSequence, SamplingParams

STOP = 0


class LetterRenderer:
    """The smallest renderer there is: a token is a character's code, an answer ends with 0."""

    stop_token_ids = (STOP,)

    def prompt(self, messages: Sequence[Message]) -> np.ndarray:
        return np.array([ord(each) for message in messages for each in message.content], dtype=np.int32)

    def reply(self, tokens: np.ndarray) -> str:
        return "".join(chr(token) for token in tokens if token != STOP)


class Echo:
    """A sampler that answers with the prompt in capitals, and remembers how it was called."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.params: list[SamplingParams] = []

    def __call__(self, prompts: Sequence[np.ndarray], params: SamplingParams) -> list[SampledSequence]:
        self.batches.append(len(prompts))
        self.params.append(params)
        texts = ["".join(chr(token) for token in prompt).upper() for prompt in prompts]
        return [self._sequence(text, params.max_tokens) for text in texts]

    def _sequence(self, text: str, max_tokens: int) -> SampledSequence:
        codes = [*map(ord, text), STOP]
        tokens = np.array(codes[:max_tokens], dtype=np.int32)
        reason = "stop" if len(codes) <= max_tokens else "length"
        return SampledSequence(tokens, np.zeros(len(tokens), dtype=np.float32), reason)


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(*texts: str) -> list[Question]:
    return [Question((Message("user", text),), text.upper()) for text in texts]


def test_answers_keep_the_order_of_the_questions() -> None:
    """Batches go by length; answers put back by position in the batch would be another question's."""
    texts = ["middle one", "a", "the longest of them all", "bb", "four"]
    echo = Echo()
    answers = answer_questions(questions(*texts), echo, LetterRenderer(), batch_size=2)
    assert [answer.text for answer in answers] == [text.upper() for text in texts]
    assert [answer.question.prompt for answer in answers] == texts
    assert echo.batches == [2, 2, 1]


def test_answers_are_greedy_and_end_where_the_template_says() -> None:
    """Sampling with a temperature would measure luck, and a missing stop token the length limit."""
    echo = Echo()
    answers = answer_questions(questions("abc", "abcdefgh"), echo, LetterRenderer(), max_new_tokens=5)
    assert echo.params == [SamplingParams(max_tokens=5, temperature=0.0, stop_token_ids=(STOP,))]
    assert [(answer.text, answer.num_tokens, answer.is_cut) for answer in answers] == [
        ("ABC", 4, False),
        ("ABCDE", 5, True),
    ]


def test_progress_counts_questions() -> None:
    seen: list[int] = []
    answer_questions(questions("a", "b", "c"), Echo(), LetterRenderer(), batch_size=2, on_progress=seen.append)
    assert seen == [2, 3]


def test_a_sampler_that_loses_an_answer_is_found_out() -> None:
    """Pairing what came back with the first questions would shift every later answer by one."""
    with pytest.raises(EngineError, match="answered 1 of 2"):
        answer_questions(questions("a", "b"), lambda prompts, params: Echo()(prompts[:1], params), LetterRenderer())


def test_prompts_and_answers_are_read(tmp_path: Path) -> None:
    path = write(
        tmp_path / "heldout.jsonl",
        {"prompt": "Which bell?", "answer": "Old Winifred."},
        {"prompt": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"},
                    {"role": "user", "content": "Which day?"}], "answer": "On Tuesdays."},
    )  # fmt: skip
    first, second = read_questions(path)
    assert first.messages == (Message("user", "Which bell?"),)
    assert first.answer == "Old Winifred."
    assert first.source == f"{path}:1"
    assert [message.role for message in second.messages] == ["user", "assistant", "user"]
    assert second.prompt == "Which day?"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "output": "A"},
        {"question": "Q", "answer": "A"},
        {"prompt": "Q", "completion": "A"},
        {"input": "Q", "output": "A"},
    ],
)
def test_any_training_format_works(row: dict, tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path / "rows.jsonl", row))
    assert (question.prompt, question.answer) == ("Q", "A")


def test_the_system_message_comes_first(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"prompt": "Q", "answer": "A"})
    (question,) = read_questions(path, system="Be brief.")
    assert question.messages[0] == Message("system", "Be brief.")


def test_two_system_messages_are_refused(tmp_path: Path) -> None:
    """Silently dropping either one would ask something nobody configured."""
    prompt = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Q"}]
    path = write(tmp_path / "rows.jsonl", {"prompt": prompt, "answer": "A"})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: system"):
        read_questions(path, system="Be brief.")
    assert len(read_questions(path)) == 1


@pytest.mark.parametrize(
    "line, named",
    [
        ('{"prompt": "Q"}', "answer"),
        ('{"answer": "A"}', "prompt"),
        ('{"prompt": "Q", "answer": ""}', "answer"),
        ('{"prompt": "Q", "answer": 42}', "answer"),
        ('{"prompt": 42, "answer": "A"}', "prompt"),
        ('{"prompt": [], "answer": "A"}', "prompt"),
        ('{"text": "plain"}', "prompt"),
        ('{"messages": [{"role": "user", "content": "Q"}]}', "messages"),
        ("[1, 2]", "a list where an object"),
        ("nonsense", "not JSON"),
    ],
)
def test_a_bad_question_is_named_by_line_and_field(line: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Q", "answer": "A"}\n\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_questions(path)
    assert f"{path}:3" in str(caught.value)
    assert named in str(caught.value)


def test_missing_empty_and_binary_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_questions(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no questions"):
        read_questions(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "Q", "answer": "caf\xe9"}\n'.encode("latin-1"))
    with pytest.raises(DataError, match="0xe9"):
        read_questions(tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path)


def test_the_demo_s_questions_are_read() -> None:
    path = Path(__file__).parents[3] / "examples" / "demo" / "heldout.jsonl"
    assert len(read_questions(path)) == 88
