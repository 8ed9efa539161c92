"""Chat, instruction, preference, KTO and text rows, made from small tasks whose right answers are computed.

A row holds one to three tasks with words and numbers drawn for it, so that rows are neither equal nor nearly so. What
is taught has no use beyond showing that a pipeline handles such rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from model_foundry.data.synth.dice import Dice
from model_foundry.data.synth.words import ADJECTIVES, NAMES, NOUNS, PLACES, SYSTEMS, TIMES, VERBS


@dataclass(frozen=True, slots=True)
class Task:
    """An instruction, what it is applied to (may be empty), the right answer and a wrong one."""

    instruction: str
    given: str
    right: str
    wrong: str

    @property
    def question(self) -> str:
        return f"{self.instruction}\n{self.given}" if self.given else self.instruction


def chat_row(dice: Dice) -> dict[str, Any]:
    """{"messages"}: one to three exchanges, at times with a system message."""
    messages = [{"role": "system", "content": dice.pick(SYSTEMS)}] if dice.chance(40) else []
    for _ in range(1 + dice.below(3)):
        task = any_task(dice)
        messages.append({"role": "user", "content": task.question})
        messages.append({"role": "assistant", "content": task.right})
    return {"messages": messages}


def instruction_row(dice: Dice) -> dict[str, Any]:
    """{"instruction", "input", "output"}."""
    task = any_task(dice)
    return {"instruction": task.instruction, "input": task.given, "output": task.right}


def preference_row(dice: Dice) -> dict[str, Any]:
    """{"prompt", "chosen", "rejected"}: the right answer before a wrong one."""
    task = any_task(dice)
    return {"prompt": task.question, "chosen": task.right, "rejected": task.wrong}


def kto_row(dice: Dice) -> dict[str, Any]:
    """{"prompt", "completion", "label"}: half of them right."""
    task = any_task(dice)
    label = dice.chance(50)
    return {"prompt": task.question, "completion": task.right if label else task.wrong, "label": label}


def text_row(dice: Dice) -> dict[str, Any]:
    """{"text"}: a paragraph of three to eight sentences."""
    return {"text": " ".join(sentence(dice) for _ in range(3 + dice.below(6)))}


def any_task(dice: Dice) -> Task:
    """One task of any kind."""
    return dice.pick(_TASKS)(dice)


def sentence(dice: Dice) -> str:
    """Somebody does something with something somewhere."""
    thing, other = dice.several(NOUNS, 2)
    return dice.pick(_SENTENCES).format(
        name=dice.pick(NAMES), verb=dice.pick(VERBS), adjective=dice.pick(ADJECTIVES), thing=thing, other=other,
        place=dice.pick(PLACES), time=dice.pick(TIMES), number=2 + dice.below(97),
    )  # fmt: skip


_SENTENCES = (
    "{name} {verb} the {adjective} {thing} at {place} {time}.",
    "The {thing} that {name} {verb} {time} stood beside the {adjective} {other}.",
    "It took {name} {number} days to see why nobody {verb} the {other} near {place}.",
    "At {place}, {number} people had {verb} the {thing}, and {name} kept the {adjective} {other}.",
    "Nobody but {name} knew that the {adjective} {thing} was older than the {other}.",
)


def _reverse(dice: Dice) -> Task:
    words = dice.several(NOUNS, 4 + dice.below(4))
    instruction = dice.pick(("Write these words in reverse order.", "Turn the order of the words around."))
    return Task(instruction, " ".join(words), " ".join(reversed(words)), " ".join(words))


def _sort_numbers(dice: Dice) -> Task:
    numbers = dice.several(range(1, 500), 5 + dice.below(3))
    up = dice.chance(50)
    right = sorted(numbers, reverse=not up)
    instruction = f"Sort the numbers from the {'smallest to the largest' if up else 'largest to the smallest'}."
    return Task(instruction, _comma(numbers), _comma(right), _comma(sorted(numbers, reverse=up)))


def _upper_case(dice: Dice) -> Task:
    text = sentence(dice)
    instruction = dice.pick(("Write this in capital letters.", "Put the sentence into capitals."))
    return Task(instruction, text, text.upper(), text.lower())


def _who(dice: Dice) -> Task:
    people = dice.several(NAMES, 3)
    things = dice.several(NOUNS, 3)
    place, time = dice.pick(PLACES), dice.pick(TIMES)
    verbs = dice.several(VERBS, 3)
    done = zip(people, verbs, things, strict=True)
    told = " ".join(f"{who} {verb} the {dice.pick(ADJECTIVES)} {thing}." for who, verb, thing in done)
    asked = dice.below(3)
    wrong = people[(asked + 1) % 3]
    instruction = f"At {place}, {time}: {told} Who {verbs[asked]} the {things[asked]}?"
    return Task(instruction, "", f"{people[asked]} {verbs[asked]} the {things[asked]}.",
                f"{wrong} {verbs[asked]} the {things[asked]}.")  # fmt: skip


def _count(dice: Dice) -> Task:
    word = dice.pick(NOUNS)
    words = dice.shuffled([word] * (2 + dice.below(4)) + dice.several([n for n in NOUNS if n != word], 5))
    number = words.count(word)
    return Task(f"How often does the word {word} stand in this list?", _comma(words), f"{number} times.",
                f"{number + 1 + dice.below(3)} times.")  # fmt: skip


def _shopping(dice: Dice) -> Task:
    name, thing = dice.pick(NAMES), dice.pick(NOUNS)
    count, price = 2 + dice.below(18), 3 + dice.below(90)
    instruction = (
        f"{name} buys {count} of the {dice.pick(ADJECTIVES)} {thing}s for {price} coins each {dice.pick(TIMES)}. "
        "What does that cost?"
    )
    off = price * (1 + dice.below(2))
    right, wrong = count * price, count * price + off
    return Task(instruction, "", f"{count} × {price} = {right} coins.", f"{count} × {price} = {wrong} coins.")


def _code(dice: Dice) -> Task:
    name, factor, shift = dice.pick(NOUNS), 2 + dice.below(30), 1 + dice.below(99)
    language = dice.pick(("lua", "python"))
    instruction = f"Write a function {name} in {language.capitalize()} that multiplies x by {factor} and adds {shift}."
    body = {
        "lua": "function {name}(x)\n  return x * {factor} + {shift}\nend",
        "python": "def {name}(x):\n    return x * {factor} + {shift}",
    }[language]
    right = body.format(name=name, factor=factor, shift=shift)
    wrong = body.format(name=name, factor=factor + 1, shift=shift)
    return Task(instruction, "", f"```{language}\n{right}\n```", f"```{language}\n{wrong}\n```")


def _comma(items: list[Any]) -> str:
    return ", ".join(map(str, items))


_TASKS: tuple[Callable[[Dice], Task], ...] = (
    _reverse, _sort_numbers, _upper_case, _who, _count, _shopping, _code,
)  # fmt: skip
