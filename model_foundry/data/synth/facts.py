"""Sets whose success can be measured: geography, arithmetic and patterns, each question with one right answer.

Training rows and held-out questions never share a wording (geography, where the facts must be taught) or a problem
(arithmetic and patterns, where the rule must be).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from model_foundry.data.synth.dice import Dice
from model_foundry.data.synth.words import COLOURS
from model_foundry.errors import DataError


@dataclass(frozen=True, slots=True)
class Problem:
    """One right answer, and the wordings that ask for it: to train on, and never to train on."""

    answer: str
    train: tuple[str, ...]
    heldout: str


def geography(num_rows: int, num_heldout: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Capitals and their countries. Rows go round all facts with another wording each time.

    Returns:
        Training rows {"messages"} and questions {"prompt", "answer"} about facts among those rows.

    Raises:
        DataError: more rows or questions than there are different ones.
    """
    facts = [fact for country, capital in capitals() for fact in _facts(country, capital)]
    wordings = len(facts[0].train)
    _require_room("geography", num_rows, len(facts) * wordings)
    order = Dice(seed, "geography").shuffled(facts)
    _require_room("geography (held-out questions)", num_heldout, min(len(order), max(num_rows, 1)))
    rows = []
    for index in range(num_rows):
        place = index % len(order)
        fact = order[place]
        rows.append(_row(fact.train[(index // len(order) + place) % wordings], fact.answer))
    return rows, [{"prompt": fact.heldout, "answer": fact.answer} for fact in order[:num_heldout]]


def arithmetic(num_rows: int, num_heldout: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sums, differences and products of small numbers; a + b and b + a count as one problem.

    Returns, Raises: as `geography`; no question's problem is among the training rows.
    """
    return _problems("arithmetic", _sums(seed), num_rows, num_heldout, seed)


def pattern(num_rows: int, num_heldout: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What comes next: number sequences, letters, colours in turn.

    Returns, Raises: as `arithmetic`.
    """
    return _problems("pattern", _patterns(), num_rows, num_heldout, seed)


OBJECTIVE_SETS: dict[str, Callable[[int, int, int], tuple[list[dict[str, Any]], list[dict[str, Any]]]]] = {
    "geography": geography,
    "arithmetic": arithmetic,
    "pattern": pattern,
}


def _problems(
    name: str, problems: Sequence[Problem], num_rows: int, num_heldout: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    _require_room(name, num_rows + num_heldout, len(problems))
    order = Dice(seed, name).shuffled(problems)
    rows = []
    for index, problem in enumerate(order[num_heldout : num_heldout + num_rows]):
        rows.append(_row(Dice(seed, name, index).pick(problem.train), problem.answer))
    return rows, [{"prompt": problem.heldout, "answer": problem.answer} for problem in order[:num_heldout]]


def _row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _require_room(name: str, wanted: int, there_are: int) -> None:
    if wanted > there_are:
        hint = "Ask for fewer, or for chat or instruction rows, of which there is no end"
        raise DataError(f"{name} has {there_are:,} different rows, and {wanted:,} are asked for", hint=hint)


def _facts(country: str, capital: str) -> tuple[Problem, Problem]:
    to_capital = (
        "What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?",
        "{}: what is its capital?", "Tell me the capital city of {}.", "Which city governs {}?",
        "I am learning capitals. What is that of {}?", "Fill in: the capital of {} is",
    )  # fmt: skip
    to_country = (
        "Of which country is {} the capital?", "{} is the capital of which country?",
        "Which country has {} as its capital?", "Name the country whose capital is {}.",
        "{}: which country does it govern?", "Whose capital is {}?", "Tell me which country is governed from {}.",
        "Fill in: {} is the capital of",
    )  # fmt: skip
    return (
        Problem(capital, tuple(text.format(country) for text in to_capital), f"If I visit {country}, what is the name "
                "of its seat of government?"),
        Problem(country, tuple(text.format(capital) for text in to_country), f"I am in {capital}, a national capital. "
                "In which country am I?"),
    )  # fmt: skip


def _sums(seed: int) -> list[Problem]:
    wordings = ("What is {}?", "Calculate {}.", "{} = ?", "How much is {}?", "Work out {}.")
    made = []
    for high in range(100):
        for low in range(high + 1):
            one, other = (high, low) if Dice(seed, "order", high, low).chance(50) else (low, high)
            terms = [(f"{one} + {other}", high + low), (f"{high} - {low}", high - low)]
            if high <= 20:
                terms.append((f"{one} × {other}", high * low))
            made += [
                Problem(str(value), tuple(text.format(term) for text in wordings), f"What does {term} give?")
                for term, value in terms
            ]
    return made


def _patterns() -> list[Problem]:
    sequences: list[list[str]] = []
    for step in range(1, 13):
        sequences += [[str(start + step * index) for index in range(5)] for start in range(1, 31)]
        sequences += [[str(start - step * index) for index in range(5)] for start in range(60, 90)]
    sequences += [[str(start * factor**index) for index in range(5)] for factor in (2, 3) for start in range(2, 22)]
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    for step in range(1, 6):
        sequences += [[letters[start + step * index] for index in range(5)] for start in range(26 - 4 * step)]
    sequences += [[one, other, one, other, one] for one in COLOURS for other in COLOURS if one != other]
    wordings = ("What comes next: {}?", "Continue the pattern: {}", "{}, and then?", "Complete: {}, …")
    made = []
    for sequence in sequences:
        shown, answer = ", ".join(sequence[:4]), sequence[4]
        asked = tuple(text.format(shown) for text in wordings)
        made.append(Problem(answer, asked, f"Which element follows {shown}?"))
    return made


def capitals() -> list[tuple[str, str]]:
    """(country, capital), by the country's name."""
    return [tuple(pair.split("=")) for pair in _CAPITALS.replace("\n", " ").split("; ")]  # type: ignore[misc]


_CAPITALS = """\
Albania=Tirana; Algeria=Algiers; Angola=Luanda; Argentina=Buenos Aires; Armenia=Yerevan; Australia=Canberra;
Austria=Vienna; Azerbaijan=Baku; Bangladesh=Dhaka; Belgium=Brussels; Bosnia and Herzegovina=Sarajevo; Brazil=Brasília;
Bulgaria=Sofia; Cambodia=Phnom Penh; Cameroon=Yaoundé; Canada=Ottawa; Chad=N'Djamena; China=Beijing; Colombia=Bogotá;
Croatia=Zagreb; Cuba=Havana; Cyprus=Nicosia; Czechia=Prague; Denmark=Copenhagen; Ecuador=Quito; Egypt=Cairo;
Estonia=Tallinn; Ethiopia=Addis Ababa; Finland=Helsinki; France=Paris; Georgia=Tbilisi; Germany=Berlin; Ghana=Accra;
Greece=Athens; Hungary=Budapest; Iceland=Reykjavik; India=New Delhi; Iran=Tehran; Iraq=Baghdad; Ireland=Dublin;
Italy=Rome; Jamaica=Kingston; Japan=Tokyo; Jordan=Amman; Kenya=Nairobi; Latvia=Riga; Lebanon=Beirut; Libya=Tripoli;
Lithuania=Vilnius; Madagascar=Antananarivo; Mali=Bamako; Malta=Valletta; Mongolia=Ulaanbaatar; Morocco=Rabat;
Mozambique=Maputo; Nepal=Kathmandu; New Zealand=Wellington; Nigeria=Abuja; Norway=Oslo; Oman=Muscat; Pakistan=Islamabad;
Peru=Lima; Poland=Warsaw; Portugal=Lisbon; Romania=Bucharest; Russia=Moscow; Rwanda=Kigali; Saudi Arabia=Riyadh;
Senegal=Dakar; Serbia=Belgrade; Slovakia=Bratislava; Slovenia=Ljubljana; Somalia=Mogadishu; South Korea=Seoul;
Spain=Madrid; Sudan=Khartoum; Sweden=Stockholm; Syria=Damascus; Thailand=Bangkok; Tunisia=Tunis; Turkey=Ankara;
Uganda=Kampala; Ukraine=Kyiv; United Kingdom=London; Uruguay=Montevideo; Venezuela=Caracas; Vietnam=Hanoi;
Zambia=Lusaka; Zimbabwe=Harare"""
