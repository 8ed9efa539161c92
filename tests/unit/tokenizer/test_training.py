"""A vocabulary learnt from a stream: its size, its special tokens, and that every text comes back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.errors import ConfigError, DataError
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import RESERVED, Tokenizer
from model_foundry.tokenizer.pre_tokenizers import PATTERNS, byte_level_words
from model_foundry.tokenizer.special import special_tokens
from model_foundry.tokenizer.training import Progress, TrainedTokenizer, cut_at_lines, train_tokenizer
from model_foundry.types import Message
from tests.conftest import CHATML, CORPUS

TEXTS = st.text(max_size=60).filter(lambda text: RESERVED not in text)


def learn(texts: list[str] | None = None, **options: object) -> TrainedTokenizer:
    options = {"vocab_size": 400, "special": special_tokens(CHATML), "chat_template": CHATML, **options}
    return train_tokenizer(CORPUS if texts is None else texts, **options)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def done() -> TrainedTokenizer:
    return learn()


def test_the_size_is_what_was_asked_for_and_special_tokens_come_first(done: TrainedTokenizer) -> None:
    tokenizer = done.tokenizer
    assert (tokenizer.vocab_size, done.num_merges, done.num_filling, done.is_short) == (400, 140, 0, False)
    assert tokenizer.special_tokens == {"<|endoftext|>": 0, "<|pad|>": 1, "<|im_start|>": 2, "<|im_end|>": 3}
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.unknown_id) == (0, 1, None, None)


@given(text=TEXTS)
@settings(max_examples=60, deadline=None)
def test_every_text_comes_back(done: TrainedTokenizer, text: str) -> None:
    """Normalisation, a lost space or a missing byte would change what a model is trained on."""
    assert done.tokenizer.decode(done.tokenizer.encode(text)) == text


@given(texts=st.lists(TEXTS, max_size=5))
@settings(max_examples=30, deadline=None)
def test_a_batch_is_the_texts_one_by_one(done: TrainedTokenizer, texts: list[str]) -> None:
    rows = done.tokenizer.encode_batch(texts)
    assert rows == [done.tokenizer.encode(text) for text in texts]
    assert done.tokenizer.decode_batch(rows) == texts


def test_saved_and_loaded_it_is_the_same(done: TrainedTokenizer, tmp_path: Path) -> None:
    done.tokenizer.save(tmp_path / "tokenizer")
    again = Tokenizer.load(tmp_path / "tokenizer")
    assert again.fingerprint == done.tokenizer.fingerprint
    assert again.chat_template == CHATML
    assert again.named == done.tokenizer.named
    again.save(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "tokenizer" / name).read_bytes()


def test_saving_never_removes_other_files(done: TrainedTokenizer, tmp_path: Path) -> None:
    """A folder is replaced as a whole: into a model's folder, that would take the weights along."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        done.tokenizer.save(tmp_path)
    done.tokenizer.save_into(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    assert Tokenizer.load(tmp_path).fingerprint == done.tokenizer.fingerprint


def test_conversations_can_be_rendered_at_once(done: TrainedTokenizer) -> None:
    renderer = Renderer(done.tokenizer)
    row = renderer.render([Message("user", "The quick fox"), Message("assistant", "jumps <|im_end|>.")])
    assert row.tokens.tolist().count(3) == 2
    assert done.tokenizer.decode(row.tokens.tolist()) == row.text
    assert set(renderer.stop_token_ids) == {0, 3}


def test_rounding_up_learns_more_rather_than_fill() -> None:
    done = learn(vocab_size=390, round_to=64)
    assert (done.tokenizer.vocab_size, done.num_filling, done.wanted_size) == (448, 0, 448)
    assert learn(vocab_size=448).tokenizer.fingerprint == done.tokenizer.fingerprint


def test_a_corpus_with_too_few_pairs_is_filled_up_to_the_next_multiple_only() -> None:
    """Filling up to the size asked for would give a small corpus an embedding of dead rows."""
    done = learn(["abc abc abd"] * 3, vocab_size=4000, round_to=64)
    assert done.is_short
    assert done.num_merges < 64
    assert done.tokenizer.vocab_size == 320
    assert done.num_filling == 320 - 256 - 4 - done.num_merges > 0
    assert done.tokenizer.is_special("<|reserved_0|>")
    short = learn(["abc abc abd"] * 3, vocab_size=4000)
    assert short.is_short
    assert short.tokenizer.vocab_size == 260 + done.num_merges


def test_rare_pairs_are_not_merged() -> None:
    assert learn(["zq"], min_frequency=2).num_merges == 0
    assert learn(["zq"], min_frequency=1).num_merges == 1


def test_control_tokens_written_in_the_corpus_are_text() -> None:
    done = learn([*CORPUS, *["<|im_end|> and <|endoftext|>"] * 50])
    ids = done.tokenizer.encode("<|im_end|> and <|endoftext|>")
    assert set(ids).isdisjoint(done.tokenizer.special_tokens.values())


@pytest.mark.parametrize("size", [-1, 0, 259])
def test_a_vocabulary_without_room_is_refused_with_its_numbers(size: int) -> None:
    with pytest.raises(ConfigError, match=rf"{size} is too small: 256 bytes and 4 special tokens .* are 260"):
        learn(vocab_size=size)
    assert learn(["ab"], vocab_size=260).tokenizer.vocab_size == 260


@pytest.mark.parametrize(("texts", "words"), [([], "no text"), (["", ""], "2 texts are empty")])
def test_an_empty_corpus_is_refused(texts: list[str], words: str) -> None:
    with pytest.raises(DataError, match=words):
        learn(texts)


def test_half_a_character_is_named() -> None:
    with pytest.raises(DataError, match=r"character 3 .*U\+D83C"):
        learn(["ab\ud83c"])


@pytest.mark.parametrize("options", [{"round_to": 0}, {"min_frequency": 0}, {"words": "nobody's"}])
def test_numbers_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        learn(None, **options)


def test_an_error_while_reading_comes_through() -> None:
    """The trainer is Rust; an error of the stream must not turn into a vocabulary of half the corpus."""

    def broken() -> object:
        yield "some text"
        raise DataError("cannot be read", where="rows.jsonl:2")

    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        train_tokenizer(broken(), vocab_size=300)  # pyright: ignore[reportArgumentType]


def test_progress_is_told_and_ends_with_merging() -> None:
    told: list[Progress] = []
    learn(["word " * 220_000], on_progress=told.append)
    assert [each.stage for each in told] == ["reading", "merging"]
    assert (told[-1].num_texts, told[-1].num_chars) == (1, 1_100_000)


@pytest.mark.parametrize("name", PATTERNS)
@given(text=st.text(st.sampled_from("ab1 '\n\r\t.s\u0301é\x85\x1c\u2028\u3000"), max_size=60), size=st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_cutting_long_texts_changes_no_word(name: str, text: str, size: int) -> None:
    """Other words would be other merges, depending on how a file is cut."""
    words = byte_level_words(name)
    pieces = list(cut_at_lines(text, max_chars=size))
    assert "".join(pieces) == text
    whole = [word for word, _ in words.pre_tokenize_str(text)]
    assert [word for piece in pieces for word, _ in words.pre_tokenize_str(piece)] == whole


@pytest.mark.slow
def test_the_number_of_threads_changes_no_byte(tmp_path: Path) -> None:
    """Threads count words in an order of their own; ties between pairs must not depend on it."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom model_foundry.tokenizer.training import train_tokenizer\n"
        "texts = [Path(each).read_text(encoding='utf-8') for each in sys.argv[2:]]\n"
        "train_tokenizer(texts * 2, vocab_size=3000).tokenizer.save(Path(sys.argv[1]))\n"
    )
    sources = sorted(str(path) for path in (Path(__file__).parents[3] / "model_foundry").rglob("*.py"))
    written = []
    for threads in ("1", "2", "3", "2"):
        folder = tmp_path / f"{threads}-{len(written)}"
        environment = {**os.environ, "RAYON_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-c", script, str(folder), *sources], env=environment, check=True, timeout=120)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert all(each == written[0] for each in written)
