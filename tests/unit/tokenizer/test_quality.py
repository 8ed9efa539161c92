"""What a report says of a tokenizer, checked on texts small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from model_foundry.errors import DataError
from model_foundry.tokenizer import Tokenizer
from model_foundry.tokenizer.quality import HeldOut, measure
from model_foundry.tokenizer.training import train_tokenizer


def held_out(*texts: str) -> list[HeldOut]:
    return [HeldOut(f"held.txt:{number}", text) for number, text in enumerate(texts, start=1)]


def word_level() -> Tokenizer:
    """Knows two words, drops the white space and has an unknown token: everything a good tokenizer has not."""
    model = tokenizers.models.WordLevel({"[UNK]": 0, "ab": 1, "cd": 2, "x": 3}, unk_token="[UNK]")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return Tokenizer(backend)


def test_counts_by_hand() -> None:
    quality = measure(word_level(), held_out("ab cd", "ab é x"))
    assert (quality.num_texts, quality.num_words, quality.num_chars, quality.num_bytes) == (2, 5, 11, 12)
    assert (quality.num_tokens, quality.num_used, quality.num_unknown, quality.num_single) == (5, 4, 1, 1)
    assert quality.bytes_per_token == 12 / 5
    assert quality.tokens_per_word == 1
    assert quality.coverage == 1
    assert quality.longest[0].text == "[UNK]"
    assert quality.longest[1].count == 2


def test_the_first_difference_is_named_by_text_and_byte() -> None:
    quality = measure(word_level(), held_out("ab", "é cd", "é"))
    assert quality.num_changed == 2
    place = quality.first_difference
    assert place is not None
    assert (place.source, place.byte, place.expected) == ("held.txt:2", 0, "é cd")
    assert place.got.startswith("[UNK]")
    after = measure(word_level(), held_out("ab  cd")).first_difference
    assert after is not None
    assert (after.byte, after.expected, after.got) == (3, "ab  cd", "ab cd")


def test_a_byte_level_tokenizer_brings_everything_back() -> None:
    tokenizer = train_tokenizer(["the quick brown fox " * 9], vocab_size=300).tokenizer
    quality = measure(tokenizer, held_out("the fox ☃\x00\r\n ", "数学 🎉"))
    assert (quality.num_changed, quality.num_unknown, quality.first_difference) == (0, 0, None)
    assert 0 < quality.coverage < 1
    assert quality.longest[0].text.strip() in ("quick", "brown")


def test_bytes_of_a_character_count_as_single() -> None:
    """A tokenizer that spells everything in bytes would otherwise look as if it had no single characters at all."""
    bytes_only = train_tokenizer(["ab"], vocab_size=258).tokenizer
    assert measure(bytes_only, held_out("é数a")).single_share == 1


@pytest.mark.parametrize("texts", [[], [""]])
def test_nothing_to_measure_is_an_error(texts: list[str]) -> None:
    with pytest.raises(DataError, match="no text to measure"):
        measure(word_level(), held_out(*texts))


def test_many_texts_are_measured_in_their_order(chatml_folder: Path) -> None:
    """Texts go through in batches: a place must not be that of another text."""
    texts = ["the quick brown fox"] * 600
    quality = measure(Tokenizer.load(chatml_folder), held_out(*texts))
    assert quality.num_texts == 600
    broken = measure(word_level(), held_out(*["ab"] * 300, "zz"))
    assert broken.first_difference is not None
    assert broken.first_difference.source == "held.txt:301"
