"""The adapter, the merged model, the GGUF and the served model get the same answers and the same likelihoods."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from model_foundry.config.schema import ModelSection
from model_foundry.errors import ConfigError
from model_foundry.evals.suite import Decoding
from model_foundry.evals.targets import Continuation, Target
from model_foundry.export.gguf import write_gguf
from model_foundry.export.merge import fill_merged_folder, plan_merge
from model_foundry.models.llama_cpp import is_installed
from model_foundry.recipes.targets import open_target
from model_foundry.types import Message
from tests.serving import serving
from tests.tiny_exports import make_subject
from tests.tiny_runs import foundry_here

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_installed(), reason="xllamacpp is not installed"),
]
PROMPTS = [(Message("user", text),) for text in ("What is 3 + 4?", "naïve café", "Name the capital.", "Who?", "Go on")]
ENDINGS = [" seven", " naïve ✓", "Paris", "a", "so it goes"]
DECODING = Decoding(max_new_tokens=12)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    folder = tmp_path_factory.mktemp("forms")
    subject = make_subject(folder)
    merge = plan_merge(subject.base, subject.adapter)
    (folder / "merged").mkdir()
    fill_merged_folder(folder / "merged", merge, base_name="base")
    renderer = subject.renderer
    write_gguf(folder / "tiny.gguf", merge, format="f32", tokenizer=renderer.tokenizer, name="tiny",
               chat_template=renderer.template_text, stop_token_ids=renderer.stop_token_ids)  # fmt: skip
    adapter = folder / "final" / "adapter"
    with serving(adapter, served_name="tuned") as served:
        yield {
            "adapter": str(adapter), "merged": str(folder / "merged"), "gguf": str(folder / "tiny.gguf"),
            "served": f"{served.url}#tuned",
        }  # fmt: skip


@pytest.fixture(scope="module")
def targets(forms: dict[str, str]) -> dict[str, Target]:
    return {form: open_target(ModelSection(name=name, dtype="float32")) for form, name in forms.items()}


@pytest.mark.parametrize("form", ["merged", "gguf", "served"])
def test_every_form_writes_what_the_adapter_writes(form: str, targets: dict[str, Target]) -> None:
    """Prevents a suite that measures another template, another end of turn or another decoding."""
    ours, theirs = (targets[each].generate(PROMPTS, DECODING, batch_size=4) for each in ("adapter", form))
    assert [(reply.text, reply.is_cut) for reply in theirs] == [(reply.text, reply.is_cut) for reply in ours]
    assert any(reply.text for reply in ours)


@pytest.mark.parametrize("form", ["merged", "gguf"])
def test_every_form_gives_the_likelihoods_that_the_adapter_gives(form: str, targets: dict[str, Target]) -> None:
    """Prevents a wrong shift by one, probabilities under a temperature, and characters of which llama.cpp is silent:
    every token here is one byte, so those of ï and ✓ are halves and thirds."""
    asked = [Continuation(prompt, ending) for prompt, ending in zip(PROMPTS, ENDINGS, strict=True)]
    asked.append(Continuation(None, "Some text, read from its 10th character on.", 10))
    ours, theirs = (targets[each].likelihoods(asked) for each in ("adapter", form))
    assert [each.num_bytes for each in ours] == [len(e.encode()) for e in ENDINGS] + [33]
    for one, other in zip(ours, theirs, strict=True):
        assert (other.num_tokens, other.num_bytes) == (one.num_tokens, one.num_bytes)
        assert other.logprob == pytest.approx(one.logprob, abs=2e-3)


def test_a_served_model_says_that_it_gives_no_likelihoods(targets: dict[str, Target]) -> None:
    assert targets["served"].no_likelihoods
    assert targets["gguf"].no_likelihoods is None


def test_the_command_asks_one_suite_of_every_form(forms: dict[str, str], tmp_path: Path) -> None:
    """Prevents an interface that only the tests use: one suite of two rows over four forms, each beside the adapter."""
    rows = [{"prompt": text, "answer": "yes"} for text in ("What is 3 + 4?", "Who?")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = {"rows": "rows.jsonl", "metrics": ["f1", "fuzzy"], "decoding": {"max_new_tokens": 6}, "guard": {"fuzzy": 0}}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(suite))
    for form, name in forms.items():
        arguments = ["evaluate", name, "--suite", tmp_path / "two.yaml", "--against", forms["adapter"], "--json",
                     f"out={tmp_path / form}", "model.dtype=float32"]  # fmt: skip
        done = foundry_here(*arguments)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["suites"]["two"]["changes"]["fuzzy"]["verdict"] == "same", form
        assert json.loads((tmp_path / form / "evaluation.json").read_bytes())["ship"] is True


def test_a_criterion_on_what_is_not_measured_names_what_is(forms: dict[str, str]) -> None:
    done = foundry_here("evaluate", forms["adapter"], "--suite", "general", "criteria.metrics={general.bleu: '> 0.1'}")
    assert done.returncode == ConfigError.exit_code
    for word in ("no suite that is asked measures general.bleu", "general.accuracy", "general.margin"):
        assert word in done.stderr
