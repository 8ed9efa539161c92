"""The tokens that a likelihood is asked of: those that training has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from model_foundry.errors import DataError
from model_foundry.evals.targets import Continuation, ending_tokens
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Message
from tests.conftest import metaspace_tokenizer, save_folder

ASKED = (Message("user", "Which colour?"),)


UNSPACED = (
    "{% for message in messages %}{{ message['role'] + ':' + eos_token + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' + eos_token }}{% endif %}"
)


@pytest.mark.parametrize("template", [None, UNSPACED], ids=["a space before answers", "none"])
def test_an_answer_has_the_tokens_that_training_gives_it(
    sentencepiece_folder: Path, template: str | None, tmp_path: Path
) -> None:
    """Prevents the likelihood of a word with a space before it where it is trained without, and the other way round."""
    path = tmp_path / "own.jinja"
    path.write_text(template or "")
    renderer = Renderer(Tokenizer.load(sentencepiece_folder), str(path) if template else "auto")
    tokens, num_read = ending_tokens(renderer, Continuation(ASKED, "The quick fox"))
    row = renderer.render([*ASKED, Message("assistant", "The quick fox")], train_on="last_assistant")
    assert tokens.tolist() == row.tokens[: len(tokens)].tolist()
    assert row.weights[:num_read].sum() == 0
    assert row.weights[num_read : len(tokens)].all()
    left = row.tokens[len(tokens) :][row.weights[len(tokens) :] > 0]
    assert left.size
    assert int(left[0]) in renderer.stop_token_ids


def test_a_text_cut_in_the_middle_is_the_text(tmp_path: Path) -> None:
    """Prevents a space that the text does not have, where its counted part begins."""
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": UNSPACED}
    tokenizer = Tokenizer.load(save_folder(tmp_path, metaspace_tokenizer(), **specials))
    text = "The quick brown fox"
    for start in (0, 4, 6):
        tokens, num_read = ending_tokens(Renderer(tokenizer), Continuation(None, text, start))
        assert num_read == 1 + (len(tokenizer.encode(text[:start])) if start else 0)
        assert tokenizer.decode(np.asarray(tokens[1:]).tolist()).strip() == text


def test_an_ending_without_tokens_is_refused(chatml_folder: Path) -> None:
    with pytest.raises(DataError, match="has no tokens"):
        ending_tokens(Renderer(Tokenizer.load(chatml_folder)), Continuation(ASKED, ""))
