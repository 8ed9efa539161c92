"""A tokenizer that we saved, read by transformers: the same ids, prompts and texts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from model_foundry.rendering import Renderer
from model_foundry.rendering.builtin_templates import read_template
from model_foundry.tokenizer import RESERVED, Tokenizer
from model_foundry.tokenizer.special import special_tokens
from model_foundry.tokenizer.training import train_tokenizer
from model_foundry.types import Message
from tests.conftest import CORPUS

pytestmark = pytest.mark.slow  # importing transformers takes seconds

PIECES = [
    "Hello",
    "  two spaces",
    "trailing  ",
    "\n\n",
    "<b>",
    "émoji 🎉",
    "数学",
    "\t{'a': 1}",
    "1234567",
    "e\u0301",
    "",
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=6).map("".join)
TEXTS = TEXTS.filter(lambda text: RESERVED not in text and "<|" not in text)


def peer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module", params=["chatml", "llama3"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = read_template(request.param).source
    done = train_tokenizer(
        CORPUS, vocab_size=400, special=special_tokens(source), chat_template=source, round_to=64, max_length=512
    )
    folder = tmp_path_factory.mktemp("trained") / request.param
    done.tokenizer.save(folder)
    return folder


def test_a_trained_tokenizer_gives_the_same_ids_and_texts(trained: Path) -> None:
    ours, theirs = Tokenizer.load(trained), peer(trained)
    assert len(theirs) == ours.vocab_size
    assert theirs.get_vocab() == ours.backend.get_vocab(with_added_tokens=True)
    assert theirs.model_max_length == ours.max_length == 512
    roles = {"eos": ours.eos_id, "pad": ours.pad_id, "bos": ours.bos_id}
    assert {role: getattr(theirs, f"{role}_token_id") for role in roles} == roles
    assert set(theirs.all_special_ids) >= {ours.eos_id, ours.pad_id}

    @given(text=TEXTS)
    @settings(max_examples=100, deadline=None)
    def check(text: str) -> None:
        ids = ours.encode(text)
        assert theirs.encode(text) == theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == ours.decode(ids) == text

    check()


def test_a_trained_tokenizer_gives_the_same_conversations(trained: Path) -> None:
    renderer, theirs = Renderer(Tokenizer.load(trained)), peer(trained)
    assert theirs.chat_template == renderer.template_text

    @given(asked=TEXTS, answered=TEXTS)
    @settings(max_examples=60, deadline=None)
    def check(asked: str, answered: str) -> None:
        messages = [Message("user", asked), Message("assistant", answered)]
        dicts = [message.as_dict() for message in messages]
        assert renderer.render(messages).tokens.tolist() == theirs.apply_chat_template(dicts, return_dict=False)
        prompt = theirs.apply_chat_template(dicts[:1], add_generation_prompt=True, return_dict=False)
        assert renderer.prompt(messages[:1]).tolist() == prompt

    check()


def test_padding_and_masks_are_the_same(trained: Path) -> None:
    ours, theirs = Tokenizer.load(trained), peer(trained)
    texts = ["The quick brown fox jumps over the lazy dog 1234567", "a", "Is it so? It is."]
    batch = ours.encode_padded(texts, max_length=8, multiple_of=8)
    assert batch.num_cut_B[0] > 0
    expected = theirs(texts, padding=True, truncation=True, max_length=8, pad_to_multiple_of=8)
    assert batch.ids_BT.tolist() == expected["input_ids"]
    assert batch.mask_BT.astype(int).tolist() == expected["attention_mask"]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("llama", [True, False])
def test_a_saved_sentencepiece_model_is_the_nearest_transformers_can_read(
    kind: str, llama: bool, tmp_path: Path
) -> None:
    """tokenizer.json cannot say all that SentencePiece does; on text without rare characters it must be the same."""
    options: dict[str, Any] = {}
    if llama:
        options = {"normalization_rule_name": "identity", "byte_fallback": True, "remove_extra_whitespaces": False}
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(line for text in CORPUS for line in text.splitlines()), model_writer=file,
        model_type=kind, vocab_size=400, minloglevel=2, hard_vocab_limit=False, **options,
    )  # fmt: skip
    (tmp_path / "a.model").write_bytes(file.getvalue())
    ours = Tokenizer.load(tmp_path / "a.model")
    ours.save(tmp_path / "saved")
    theirs = peer(tmp_path / "saved")
    assert len(theirs) == ours.vocab_size
    for text in [*CORPUS[:5], "The lazy dog  says: naïve café", "word", "12 34", "tabs\tand\nlines", "数学 ☃"]:
        ids = ours.encode(text, parse_special=True)  # as transformers does
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
