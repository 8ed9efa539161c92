"""Small real tokenizers that every test may use; trained here in milliseconds, nothing is downloaded."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog while the user asks the assistant a question.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i, '<tag>', \"quoted\")\n",
    "What is the capital of France? The capital of France is Paris. Ünïcödé, naïve café, 数学, emoji 🎉.",
    "[INST] Is it so? [/INST] It is. [INST] 0123456789 [/INST] <s> and </s> are written like this.",
    "system user assistant tool ### Instruction: ### Response: Below is an instruction that describes a task.",
] * 4

# A change is judged by the same examples every time; on a developer's machine every run tries new ones.
settings.register_profile("ci", derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """A command called in this process sets logging up for good, as its own; the next test starts afresh."""
    loggers = [logging.getLogger(name) for name in ("model_foundry", "uvicorn.error")]
    before = [(one.level, one.propagate, list(one.handlers)) for one in loggers]
    yield
    for one, (level, propagate, handlers) in zip(loggers, before, strict=True):
        one.setLevel(level)
        one.propagate, one.handlers[:] = propagate, handlers


def byte_level_tokenizer(specials: list[str], *, vocab_size: int = 500) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace_tokenizer(*, legacy: bool = False) -> Tokenizer:
    """SentencePiece-like Unigram with BOS: `▁` before the first word, or (legacy) before every run of text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # no piece crosses a space
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    if legacy:
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def save_folder(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """A Hugging Face tokenizer folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def chatml_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with ChatML and Llama-3 control tokens, two that are not special, and a chat template."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>"]
    specials += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer = byte_level_tokenizer(specials)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return save_folder(
        tmp_path_factory.mktemp("chatml"),
        tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        bos_token="<|begin_of_text|>",
        chat_template=CHATML,
    )


@pytest.fixture(scope="session", params=["first", "legacy"])
def sentencepiece_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SentencePiece-like tokenizers with a Llama-2-like template, in which BOS is text."""
    template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token }}{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% endif %}{% endfor %}"
    )
    return save_folder(
        tmp_path_factory.mktemp(f"sentencepiece-{request.param}"),
        metaspace_tokenizer(legacy=request.param == "legacy"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny random model of a kind named in `tests.tiny_models`, made once. Don't write there."""
    root = tmp_path_factory.mktemp("tiny-models")

    def folder(kind: str) -> Path:
        from tests.tiny_models import FOREIGN, write_tiny_model, write_with_transformers

        if not (root / kind).exists():
            write = write_with_transformers if kind in FOREIGN else write_tiny_model
            write(root / kind, kind)
        return root / kind

    return folder
