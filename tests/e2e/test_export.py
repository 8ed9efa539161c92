"""The real model with an adapter, merged and as a GGUF, asked through llama.cpp."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from model_foundry.export.certificate import Origin
from model_foundry.export.gguf import write_gguf
from model_foundry.export.hand_over import export
from model_foundry.export.measure import Subject, check_gguf
from model_foundry.export.merge import plan_merge
from model_foundry.export.parity import make_probe
from model_foundry.models.finder import resolve_model
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import LoraConfig, Message
from tests.tiny_adapters import write_tiny_adapter
from tests.tiny_exports import make_subject
from tests.tiny_runs import assert_one_paragraph, environment, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    base = resolve_model("smollm2-135m-instruct").folder
    folder = tmp_path_factory.mktemp("real") / "adapter"
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=("q_proj", "k_proj", "down_proj"))
    # At 0.06 the effect is 2.5 times what q4_k_m loses, not four; at 0.2 logits in bfloat16 are off as well.
    adapter = write_tiny_adapter(folder, base, lora, scale=0.12)
    renderer = Renderer(Tokenizer.load(base))
    prompts = ((Message("user", "Count from 1 to 5."),), (Message("user", "Name three colours, naïve <|im_end|>."),))
    origin = Origin("real", "smollm2-135m-instruct", "0" * 64, "1" * 64, renderer.name, "the test")
    return Subject(base, adapter, renderer, prompts, origin)


def test_llama_cpp_answers_as_the_adapter_does(subject: Subject, tmp_path: Path) -> None:
    merge = plan_merge(subject.base, subject.adapter)
    probe = make_probe(merge, subject.renderer, subject.prompts)
    for format in ("bf16", "q8_0", "q4_k_m"):
        written = write_gguf(
            tmp_path / f"{format}.gguf", merge, format=format, tokenizer=subject.renderer.tokenizer, name="real",
            chat_template=subject.renderer.template_text, stop_token_ids=subject.renderer.stop_token_ids,
        )  # fmt: skip
        checks = check_gguf(written, subject, merge, probe, readers=("llama.cpp",))
        assert [check for check in checks if not check.passed] == []
        assert len(checks) == 8


@torch.no_grad()
def test_the_merged_folder_is_what_transformers_loads(subject: Subject, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    certificate = export(subject, tmp_path / "out", kind="merged", dtype="bfloat16")
    assert certificate["passed"]
    merge = plan_merge(subject.base, subject.adapter)
    probe = make_probe(merge, subject.renderer, subject.prompts)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype=torch.float32).eval()
    row, start = probe.rows[0], probe.starts[0]
    found = model(row[None]).logits[0, start - 1 : -1].argmax(dim=1)
    assert torch.equal(found[:4], row[start:][:4])
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    chat = [{"role": "user", "content": "Count from 1 to 5."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(ids) == row[:start].tolist()


def limit_file_size() -> None:
    """A disk that fills: files may grow to half a megabyte, then writing fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))


@pytest.mark.parametrize("kind", ["merged", "gguf"])
def test_a_disk_that_fills_leaves_nothing_and_is_one_paragraph(tmp_path: Path, kind: str) -> None:
    wide = make_subject(tmp_path / "subject", hidden_size=512, intermediate_size=1024)
    done = subprocess.run(
        [sys.executable, "-m", "model_foundry", "export", str(wide.adapter), "--to", kind, "--out",
         str(tmp_path / "out" / kind), *(["--quant", "f32"] if kind != "merged" else [])],
        env=environment(), preexec_fn=limit_file_size, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert_one_paragraph(done, code=3, words=("disk is full", "--out PATH"))
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_that_is_told_to_stop_leaves_nothing(tmp_path: Path) -> None:
    """SIGTERM ended it on the spot, with its half-written folder beside the target."""
    small = make_subject(tmp_path / "subject")
    out = tmp_path / "out"
    running = start("export", small.adapter, "--to", "merged", "--out", out / "merged", env=environment())
    until = time.monotonic() + 120
    while not list(out.glob(".tmp-merged-*")):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    running.terminate()
    _, said = running.communicate(timeout=60)
    assert running.returncode == 3, said
    assert "interrupted before it was done" in said
    assert list(out.iterdir()) == []
