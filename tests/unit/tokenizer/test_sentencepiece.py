"""SentencePiece models give the ids that the `sentencepiece` package gives, on text made to be difficult."""

from __future__ import annotations

import io
import json
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.errors import ModelError
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import RESERVED, Tokenizer
from model_foundry.tokenizer.sentencepiece_file import PieceType, parse_sentencepiece, read_sentencepiece
from model_foundry.types import Message
from tests.conftest import CHATML, CORPUS

LINES = [line for text in CORPUS[:5] for line in text.splitlines()] + [
    "aaaa aaab abab ababab ==== ---- -- === a aa aaa",
    "ﬁne ½ ㌀ ＡＢＣ e\u0301 Ω words. Words, wordy; 0123456789 12 34",
    "SentencePiece keeps  two spaces   and three, where it is told to keep them.",
]
USER_SYMBOLS = ["<sep>", "▁x", "abab", "[INST]"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "llama": {
        "normalization_rule_name": "identity", "byte_fallback": True, "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True, "split_digits": True,
    },
    "symbols": {"user_defined_symbols": USER_SYMBOLS, "control_symbols": ["<c>"], "byte_fallback": True},
    "no space": {
        "add_dummy_prefix": False, "remove_extra_whitespaces": False, "normalization_rule_name": "nmt_nfkc_cf",
        "user_defined_symbols": USER_SYMBOLS, "split_by_whitespace": False,
    },
}  # fmt: skip
KINDS = [(kind, name) for kind in ("unigram", "bpe") for name in OPTIONS]

WORDS = (
    "the quick a aaaa abab ababab ---- === 0123 <s> </s> <unk> <0x41> <sep> <c> [INST] ▁ ▁▁ ▁x x xx don't word. ! "
    "capital é e\u0301 ａ\u0301 ﬁ ½ ㌀ 한 \u1112\u1161\u11ab \u1112\u1161 数学 🎉 👨\u200d👩\u200d👧 Ω \u0344 "
    "\u0340\u0341 İ ß ﷺ \ufeff \U0001d11e\U0001d165 A\u0302\u0300 q\u0323\u0307 \u200b \u200d \x01 \x00"
)
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\u3000", "\u00a0", "\u2028", "\u2003", "\x0b"]
ATOMS = [*WORDS.split(" "), *SPACES]
TEXTS = st.lists(st.one_of(st.sampled_from(ATOMS), st.text(max_size=3), st.just(" ")), max_size=12).map("".join)


@cache
def trained(kind: str, name: str) -> bytes:
    """A model file. Training takes milliseconds; the options are those that change how text is encoded."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(LINES * 4), model_writer=file, model_type=kind, vocab_size=420, minloglevel=2,
        hard_vocab_limit=False, num_threads=1, **OPTIONS[name],
    )  # fmt: skip
    return file.getvalue()


@cache
def peer(kind: str, name: str) -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=trained(kind, name))


@cache
def ours(kind: str, name: str, folder: Path) -> Tokenizer:
    path = folder / f"{kind}-{name}.model"
    path.write_bytes(trained(kind, name))
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def score(kind: str, name: str, ids: list[int]) -> float:
    """What a unigram model makes best: a sum, so two divisions may be equally good."""
    pieces = parse_sentencepiece(trained(kind, name)).pieces
    return sum(pieces[token_id].score for token_id in ids if pieces[token_id].type == PieceType.NORMAL)


def assert_same_ids(kind: str, name: str, folder: Path, text: str) -> None:
    ids, expected = ours(kind, name, folder).encode(text), peer(kind, name).encode(text)
    if ids != expected and kind == "unigram":  # float32 decides between equals there, float64 here
        assert abs(score(kind, name, ids) - score(kind, name, expected)) < 1e-4, text
        return
    assert ids == expected, text


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_ids_are_those_of_the_package(kind: str, name: str, folder: Path) -> None:
    for line in [*LINES, *ATOMS, "", " ", *(f" {atom}  {atom}\n" for atom in ATOMS), "".join(ATOMS), " ".join(ATOMS)]:
        assert_same_ids(kind, name, folder, line)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_ids_are_those_of_the_package_on_any_text(kind: str, name: str, folder: Path) -> None:
    @given(text=TEXTS)
    @settings(max_examples=300, deadline=None)
    def check(text: str) -> None:
        assert_same_ids(kind, name, folder, text.replace(RESERVED, ""))

    check()


def test_ordinary_text_never_meets_a_tie(folder: Path) -> None:
    """Were the tolerance for equal scores wide enough to hide a difference, this would show it."""
    for kind, name in KINDS:
        for line in LINES[:-3]:
            assert ours(kind, name, folder).encode(line) == peer(kind, name).encode(line)


@pytest.mark.parametrize(("kind", "name"), KINDS)
def test_decoding_is_that_of_the_package(kind: str, name: str, folder: Path) -> None:
    for line in [*LINES, " ".join(ATOMS[:4]), "word. don't"]:
        ids = peer(kind, name).encode(line)
        if peer(kind, name).unk_id() not in ids:  # which the package writes as ⁇
            assert ours(kind, name, folder).decode(ids) == peer(kind, name).decode(ids)


@pytest.mark.parametrize(("kind", "name"), KINDS)
@given(text=TEXTS)
@settings(max_examples=10, deadline=None)
def test_offsets_lie_in_the_text_and_ascend(kind: str, name: str, folder: Path, text: str) -> None:
    """Loss weights are found by these; one that runs backwards would train the wrong token."""
    tokenizer = ours(kind, name, folder)
    ids, offsets = tokenizer.plain(frozenset()).encode(text.replace(RESERVED, ""), first=True)
    assert len(ids) == len(offsets)
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert offsets == sorted(offsets)


def test_offsets_point_at_what_a_rule_rewrote(folder: Path) -> None:
    tokenizer = ours("bpe", "plain", folder)
    text = "ﬁne  ½ e\u0301"
    ids, offsets = tokenizer.plain(frozenset()).encode(text, first=True)
    by_start = {text[start:end] for start, end in offsets}
    assert "".join(tokenizer.backend.id_to_token(token_id) or "" for token_id in ids) == "▁fine▁1⁄2▁é"
    assert {"ﬁ", "½"} & {part.strip() for part in by_start}


def test_control_pieces_are_read_only_when_asked_for(folder: Path) -> None:
    """Their names stand in the vocabulary, as those of the byte pieces do: text that spells one must not become it."""
    for kind, name in KINDS:
        tokenizer = ours(kind, name, folder)
        eos = tokenizer.eos_id
        assert eos not in tokenizer.encode("one </s> two<s>")
        assert eos in tokenizer.encode("one </s> two<s>", parse_special=True)
        assert len(tokenizer.encode("<0x41>")) > 1


def test_a_batch_is_the_texts_one_by_one(folder: Path) -> None:
    for kind, name in KINDS:
        tokenizer = ours(kind, name, folder)
        texts = [*LINES, *ATOMS, "", " </s> ☃☃ 数"]
        for parse in (False, True):
            rows = [tokenizer.encode(text, parse_special=parse) for text in texts]
            assert tokenizer.encode_batch(texts, parse_special=parse) == rows


def test_saved_and_loaded_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    for kind, name in KINDS:
        tokenizer = ours(kind, name, folder)
        target = tmp_path / f"{kind}-{name}"
        tokenizer.save(target)
        again = Tokenizer.load(target)
        assert again.fingerprint == tokenizer.fingerprint
        assert [again.encode(atom) for atom in ATOMS] == [tokenizer.encode(atom) for atom in ATOMS]
        assert (target / "tokenizer.model").read_bytes() == trained(kind, name)


def test_chat_tokens_can_be_added_to_a_model(folder: Path, tmp_path: Path) -> None:
    """The added ones cut the text; what stands between them is the model's, without a space of its own making."""
    (tmp_path / "tokenizer.model").write_bytes(trained("bpe", "llama"))
    size = len(read_sentencepiece(tmp_path / "tokenizer.model").pieces)
    added = {str(size + index): {"content": text, "special": True} for index, text in enumerate(TOKENS)}
    config = {"added_tokens_decoder": added, "chat_template": CHATML, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    row = Renderer(tokenizer).render([Message("user", "the quick </s>"), Message("assistant", "fox <|im_end|>")])
    ids = row.tokens.tolist()
    assert [ids.count(size), ids.count(size + 1), ids.count(2)] == [2, 2, 0]
    assert tokenizer.decode(ids) == row.text
    tokenizer.save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").encode(row.text, parse_special=True) == tokenizer.scan(row.text)[0]


TOKENS = ["<|im_start|>", "<|im_end|>"]


def test_a_class_that_numbers_pieces_otherwise_is_refused(tmp_path: Path) -> None:
    """XLM-R's ids are the model's plus one: loaded as they stand, every token would be its neighbour."""
    (tmp_path / "sentencepiece.bpe.model").write_bytes(trained("unigram", "plain"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    with pytest.raises(ModelError, match="XLMRobertaTokenizer"):
        Tokenizer.load(tmp_path)


def test_an_added_token_out_of_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained("bpe", "plain"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"9000": {"content": "<x>"}}}))
    with pytest.raises(ModelError, match="number 9000"):
        Tokenizer.load(tmp_path)


def test_a_llama_folder_begins_texts_with_bos(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained("bpe", "llama"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.adds_bos
    assert tokenizer.encode("the", add_special=True) == [tokenizer.bos_id, *peer("bpe", "llama").encode("the")]


def load_and_use(path: Path, data: bytes) -> None:
    """Half a file may be a model by itself; whatever is not must be an error in words."""
    path.write_bytes(data)
    with suppress(ModelError):
        Tokenizer.load(path).encode("some text ½")


@given(place=st.integers(0, 6000), cut=st.booleans(), byte=st.binary(min_size=1, max_size=1))
@settings(max_examples=25, deadline=None)
def test_a_damaged_file_is_no_crash(folder: Path, place: int, cut: bool, byte: bytes) -> None:
    whole = trained("bpe", "llama")
    place %= len(whole)
    load_and_use(folder / "damaged.model", whole[:place] if cut else whole[:place] + byte + whole[place + 1 :])


def test_damaged_normalisation_rules_are_no_crash(folder: Path) -> None:
    """They are a tree of offsets: one wrong number leads anywhere."""
    whole = trained("bpe", "symbols")
    start = whole.index(parse_sentencepiece(whole).charsmap)
    for place in (0, 5, 150_001, 200_003):
        load_and_use(folder / "damaged.model", whole[: start + place] + b"\xfe" + whole[start + place + 1 :])
    path = folder / "damaged.model"
    path.write_bytes(whole[:start] + b"\xff" * 4 + whole[start + 4 :])
    with pytest.raises(ModelError, match="rules"):
        Tokenizer.load(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "char"}, "char"),
        ({"model_type": "word", "hard_vocab_limit": False}, "word"),
        ({"treat_whitespace_as_suffix": True}, "behind the words"),
    ],
)
def test_what_cannot_be_encoded_alike_is_refused(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(LINES), model_writer=file, **{"vocab_size": 120, "minloglevel": 2, **options}
    )
    (tmp_path / "x.model").write_bytes(file.getvalue())
    with pytest.raises(ModelError, match=words):
        Tokenizer.load(tmp_path / "x.model")


@pytest.mark.parametrize("content", [b"", b"\0" * 40, b"not a model at all", bytes(range(256))])
def test_other_files_are_no_models(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.model").write_bytes(content)
    with pytest.raises(ModelError, match=r"x\.model"):
        Tokenizer.load(tmp_path / "x.model")
