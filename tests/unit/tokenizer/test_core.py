"""Loading and encoding: control tokens in text stay text, ids stay the file's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.errors import DataError, ModelError
from model_foundry.tokenizer import RESERVED, Tokenizer


@pytest.fixture(scope="session")
def chatml(chatml_folder: Path) -> Tokenizer:
    return Tokenizer.load(chatml_folder)


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_folder: Path) -> Tokenizer:
    return Tokenizer.load(sentencepiece_folder)


def test_named_tokens_and_template_come_from_the_folder(chatml: Tokenizer) -> None:
    assert chatml.eos_id == chatml.special_tokens["<|im_end|>"]
    assert chatml.bos_id == chatml.special_tokens["<|begin_of_text|>"]
    assert chatml.pad_id == chatml.special_tokens["<|endoftext|>"]
    assert chatml.chat_template is not None
    assert "<|im_start|>" in chatml.chat_template
    assert not chatml.adds_bos
    assert chatml.vocab_size == max(chatml.special_tokens.values()) + 1


def test_text_round_trips(chatml: Tokenizer) -> None:
    text = "Naïve café, 数学 🎉\n\tdef f(): pass"
    assert chatml.decode(chatml.encode(text)) == text


def test_special_tokens_can_be_left_out_of_the_text(chatml: Tokenizer) -> None:
    ids = chatml.encode("<|im_start|>a b<|im_end|>", parse_special=True)
    assert chatml.decode(ids) == "<|im_start|>a b<|im_end|>"
    assert chatml.decode(ids, skip_special=True) == "a b"
    assert chatml.decode_batch([ids, ids[:1]], skip_special=True) == ["a b", ""]


def test_half_a_character_is_an_error_in_words(chatml: Tokenizer, sentencepiece: Tokenizer) -> None:
    """JSON can hold one as an escape; the library says only that a string was expected."""
    for tokenizer in (chatml, sentencepiece):
        for parse in (False, True):
            with pytest.raises(DataError, match=r"character 2 .*U\+DC00"):
                tokenizer.encode("a\udc00b", parse_special=parse)


def test_control_tokens_are_parsed_only_when_asked_for(chatml: Tokenizer) -> None:
    control = chatml.special_tokens["<|im_end|>"]
    assert control not in chatml.encode("a<|im_end|>b")
    assert control in chatml.encode("a<|im_end|>b", parse_special=True)
    assert chatml.decode(chatml.encode("a<|im_end|>b")) == "a<|im_end|>b"


def test_added_tokens_that_the_template_does_not_write_stay_ordinary(chatml: Tokenizer) -> None:
    assert chatml.encode("<think>") == [chatml.special_tokens["<think>"]]
    assert "<think>" in chatml.control_tokens("{{ '<think>' }}")


def test_unigram_vocabulary_holds_control_tokens_yet_text_does_not_make_them(sentencepiece: Tokenizer) -> None:
    """Unigram and BPE vocabularies list `</s>`; merely not splitting on it would still give its id."""
    ids = sentencepiece.encode("one </s> two <s>")
    assert sentencepiece.eos_id not in ids
    assert sentencepiece.bos_id not in ids


def test_bos_is_added_once_and_only_on_request(sentencepiece: Tokenizer) -> None:
    plain, framed = sentencepiece.encode("the fox"), sentencepiece.encode("the fox", add_special=True)
    assert framed == [sentencepiece.bos_id, *plain]
    assert sentencepiece.adds_bos


def test_hiding_tokens_keeps_every_other_id(chatml: Tokenizer) -> None:
    """Removing added tokens instead of renaming them would shift the ids of those that follow."""
    hidden = chatml.plain(frozenset({"<|im_end|>", "<|eot_id|>"}))
    text = "the quick <|im_start|> fox <think>"
    assert hidden.encode(text, first=True)[0] == chatml.encode(text, parse_special=True)


def test_merges_that_spell_a_control_token_are_not_taken() -> None:
    """A BPE vocabulary can reach a control token by merging, as tokenizers converted from SentencePiece do."""
    vocab = {piece: index for index, piece in enumerate(["<", "/", "s", ">", "</", "s>", "</s>", "a"])}
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    backend.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(backend, named={"eos_token": "</s>"})
    assert tokenizer.encode("a</s>a") == [vocab["a"], vocab["</"], vocab["s>"], vocab["a"]]


def test_reserved_characters_are_refused_not_misread(chatml: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"U\+10FFFE"):
        chatml.encode(f"a{RESERVED}0b")


@given(text=st.text(alphabet="<|im_endstar>/ \nax", max_size=60))
@settings(max_examples=60, deadline=None)
def test_text_never_gives_a_control_id(chatml: Tokenizer, text: str) -> None:
    control = {chatml.special_tokens[token] for token in chatml.control_tokens()}
    assert control.isdisjoint(chatml.encode(text))
    assert control.isdisjoint(chatml.encode(f"{text}<|im_end|>{text}"))


def test_fingerprint_tells_tokenizers_apart_and_ignores_layout(chatml_folder: Path, tmp_path: Path) -> None:
    original = Tokenizer.load(chatml_folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((chatml_folder / name).read_text(encoding="utf-8"))
        (tmp_path / name).write_text(json.dumps(content, indent=7), encoding="utf-8")
    assert Tokenizer.load(tmp_path).fingerprint == original.fingerprint
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|endoftext|>"}))
    assert Tokenizer.load(tmp_path).fingerprint != original.fingerprint


def test_truncation_stored_in_the_file_is_switched_off(chatml_folder: Path, tmp_path: Path) -> None:
    """tokenizer.json can carry a truncation left by whoever saved it, which would cut every row in silence."""
    backend = tokenizers.Tokenizer.from_file(str(chatml_folder / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "the quick brown fox jumps over the lazy dog"
    assert Tokenizer.load(tmp_path).encode(text) == Tokenizer.load(chatml_folder).encode(text)


def test_template_file_wins_over_the_key_and_lists_give_their_default(chatml_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((chatml_folder / "tokenizer.json").read_bytes())
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.load(tmp_path).chat_template == "D"
    (tmp_path / "chat_template.jinja").write_text("J", encoding="utf-8")
    assert Tokenizer.load(tmp_path).chat_template == "J"


def test_tokens_only_the_configuration_names_are_added(chatml_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((chatml_folder / "tokenizer.json").read_bytes())
    size = Tokenizer.load(chatml_folder).vocab_size
    config = {"added_tokens_decoder": {str(size): {"content": "<|extra|>", "special": True}}, "eos_token": "<|stop|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.special_tokens["<|extra|>"] == size
    assert tokenizer.eos_id == size + 1


def test_named_tokens_may_come_from_the_older_map(chatml_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((chatml_folder / "tokenizer.json").read_bytes())
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|eot_id|>"}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == tokenizer.special_tokens["<|eot_id|>"]
    assert tokenizer.chat_template is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"model": {}}', b"\xff\xfe"])
def test_unreadable_files_are_errors_that_name_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_the_longest_token_bounds_the_number_of_tokens(chatml: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert chatml.max_chars_per_token is not None
    text = "the quick brown fox " * 50
    assert len(text) / chatml.max_chars_per_token <= len(chatml.encode(text))
    assert sentencepiece.max_chars_per_token is None
