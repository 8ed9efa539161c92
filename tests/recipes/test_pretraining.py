"""Pretraining from a configuration to its report: what is learned, what coincides, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file

from model_foundry.errors import ConfigError, DataError, FoundryError, ModelError
from model_foundry.recipes.corpus import prepare_corpus
from model_foundry.recipes.plan import plan_text
from model_foundry.recipes.training_run import plan_run, run_training
from model_foundry.run.directory import utc_now
from model_foundry.run.metrics import comparable_lines, read_metrics
from model_foundry.tokenizer import Tokenizer
from tests.conftest import byte_level_tokenizer, save_folder
from tests.shard_sets import pack
from tests.tiny_runs import write_jsonl
from tests.tiny_text import documents, tiny_experiment


def weights(run: Path) -> dict[str, np.ndarray]:
    folder = run / "checkpoints" / "final" / "model"
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def train_sentencepiece(path: Path, texts: list[str]) -> None:
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, model_type="bpe", vocab_size=310, byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip


def assert_same_run(a: Path, b: Path) -> None:
    assert comparable_lines(a / "metrics.jsonl") == comparable_lines(b / "metrics.jsonl")
    mine, theirs = weights(a), weights(b)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)


def test_it_learns_reports_and_transformers_loads_it(chatml_folder: Path, tmp_path: Path) -> None:
    """The whole path: text, shards, fresh weights, the loop, held-out bits, samples, a folder that others read."""
    config = tiny_experiment(
        tmp_path, tokenizer=chatml_folder, training__max_steps=80, training__save_steps=40, training__eval_steps=40,
        evaluation={"prompts": ["the fox"], "max_new_tokens": 16},
        criteria={"below_unigram": 0.2, "replay_steps": 40},
    )  # fmt: skip
    report = run_training(config)
    assert report.verdict == "passed", [check for check in report.checks if not check.passed]
    assert {check.name for check in report.checks} == {
        "loss_fall", "below_unigram", "artefacts_load", "replay_identical"
    }  # fmt: skip
    bits = report.text["bits_per_byte"]
    assert bits["this model"] < 0.8 * bits["token frequencies"]
    assert {"gzip -9", "xz -9e"} < bits.keys()
    records = read_metrics(config.run_dir / "metrics.jsonl")
    samples = [record for record in records if record["kind"] == "sample"]
    assert [sample["step"] for sample in samples] == [0, 40, 80]
    assert all(sample["prompt"] == "the fox" and sample["text"] for sample in samples)
    measured = [record["bits_per_byte"] for record in records if record["kind"] == "validation"]
    assert measured[-1] == pytest.approx(bits["this model"])
    assert measured[-1] < measured[0]
    page = (config.run_dir / "report.html").read_text()
    assert "xz -9e" in page
    assert "Written after step 80" in page

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = config.run_dir / "checkpoints" / "final" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = documents(1, seed=9)[0]["text"]
    encoded = tokenizer(text, return_tensors="pt")
    loss = float(model(**encoded, labels=encoded["input_ids"]).loss.detach())
    assert loss < 0.6 * np.log(model.config.vocab_size)


def test_a_run_is_the_same_whoever_reads_its_chunks(chatml_folder: Path, tmp_path: Path) -> None:
    """Loader processes, and more than two epochs."""
    runs = [
        tiny_experiment(
            tmp_path / name, tokenizer=chatml_folder, training__epochs=2.3, training__max_steps=None,
            training__batch_size=16, data__loader_processes=processes, work_dir=str(tmp_path / "work"),
        )
        for name, processes in (("none", 0), ("two", 2))
    ]  # fmt: skip
    for config in runs:
        run_training(config)
    assert_same_run(*(config.run_dir for config in runs))
    last = [record for record in read_metrics(runs[0].run_dir / "metrics.jsonl") if record["kind"] == "step"][-1]
    assert last["epoch"] == pytest.approx(2.3, abs=0.1)


def test_accumulating_is_a_larger_batch(chatml_folder: Path, tmp_path: Path) -> None:
    """Mean of means: a last, shorter micro-batch would weigh as much as a full one."""
    losses = []
    for size, accumulated in ((8, 1), (2, 4)):
        config = tiny_experiment(
            tmp_path / f"{size}", tokenizer=chatml_folder, training__batch_size=size,
            training__gradient_accumulation_steps=accumulated,
        )  # fmt: skip
        run_training(config)
        losses.append(
            [each["loss"] for each in read_metrics(config.run_dir / "metrics.jsonl") if each["kind"] == "step"]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_steps_come_from_steps_tokens_or_epochs(chatml_folder: Path, tmp_path: Path) -> None:
    def prepared(**changes: Any) -> Any:
        changes = {"training__max_steps": None, **changes}
        config = tiny_experiment(tmp_path, tokenizer=chatml_folder, **changes)
        return prepare_corpus(config, now=utc_now())

    by_tokens = prepared(training__max_tokens=1000)
    assert by_tokens.num_chunks == 32
    assert by_tokens.total_steps == 8
    by_epochs = prepared(training__epochs=2)
    assert by_epochs.num_chunks == 2 * by_epochs.train.num_bins
    assert prepared(training__max_steps=5).total_steps == 5


def test_documents_are_kept_apart_when_asked(chatml_folder: Path, tmp_path: Path) -> None:
    """Masked documents are datums of their own, and no token is lost by it but each document's first as a target."""
    made = {}
    for mask in (False, True):
        config = tiny_experiment(tmp_path / str(mask), tokenizer=chatml_folder, data__mask_documents=mask)
        made[mask] = prepare_corpus(config, now=utc_now())
    together = [datum for batch in made[False].micro_batches(1) for datum in batch]
    apart = [datum for batch in made[True].micro_batches(1) for datum in batch]
    assert len(together) == 4
    assert len(apart) > 4
    separator = made[True].renderer.tokenizer.special_tokens["<|im_end|>"]
    assert all(separator not in datum.tokens[:-1] for datum in apart)
    assert sum(float(datum.loss_inputs["weights"].sum()) for datum in apart) == pytest.approx(1.0)


def test_shards_made_beforehand_are_used_as_they_are(chatml_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", documents(60))
    pack(source, tmp_path / "shards", chatml_folder, kind="text", max_length=32)
    config = tiny_experiment(
        tmp_path / "a", tokenizer=chatml_folder, data__train_file=str(tmp_path / "shards"),
        data__validation_file=str(source),
    )  # fmt: skip
    report = run_training(config)
    assert report.verdict == "passed", report.checks
    assert not list((tmp_path / "a").glob("work/shards/train*"))


def test_what_is_read_when_text_is_packed_is_refused_for_shards(
    chatml_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prevents a separator that nothing writes, and a share that nothing holds out, without a word."""
    source = write_jsonl(tmp_path / "text.jsonl", documents(60))
    pack(source, tmp_path / "shards", chatml_folder, kind="text", max_length=32)
    shards = {"tokenizer": chatml_folder, "data__train_file": str(tmp_path / "shards")}
    with pytest.raises(ConfigError, match=r"data\.separator: separator is read when text is packed"):
        plan_run(tiny_experiment(tmp_path / "a", data__separator="<|im_end|>", **shards))
    plan_run(tiny_experiment(tmp_path / "b", **shards))
    assert "packed shards are not split, and no text is held out" in capsys.readouterr().err
    mixed = tiny_experiment(
        tmp_path / "c", data__separator="<|im_end|>", data__validation_file=str(source), **shards,
        evaluation={"max_tokens": 200},
    )  # fmt: skip
    assert "60 held out (the first 192 of " in plan_text(plan_run(mixed))


def test_training_goes_on_from_a_model(chatml_folder: Path, tmp_path: Path) -> None:
    """Continued pretraining starts where the first run ended."""
    first = tiny_experiment(tmp_path / "first", tokenizer=chatml_folder)
    run_training(first)
    second = tiny_experiment(
        tmp_path / "second", tokenizer=chatml_folder, tokenizer__name=None,
        model={"name": str(first.run_dir), "dtype": "float32"},
    )  # fmt: skip
    run_training(second)
    ends = [
        [each["loss"] for each in read_metrics(config.run_dir / "metrics.jsonl") if each["kind"] == "validation"]
        for config in (first, second)
    ]
    assert ends[1][0] == pytest.approx(ends[0][-1], rel=1e-6)


@pytest.mark.parametrize("named", ["folder", "file"])
def test_a_sentencepiece_model_is_a_vocabulary_to_start_with(named: str, tmp_path: Path) -> None:
    """Prevents a .model file, which everything else here reads, from stopping at a tokenizer.json that it lacks."""
    folder = tmp_path / "vocabulary"
    folder.mkdir()
    train_sentencepiece(folder / "tokenizer.model", [row["text"] for row in documents(120)])
    tokenizer = folder if named == "folder" else folder / "tokenizer.model"
    config = tiny_experiment(tmp_path, tokenizer=tokenizer, training__max_steps=2)
    assert run_training(config).verdict == "passed"
    end = Tokenizer.load(config.run_dir / "checkpoints" / "final" / "model")
    assert end.fingerprint == Tokenizer.load(tokenizer).fingerprint
    assert end.sentencepiece is not None


def test_a_plan_says_the_text_and_the_steps(chatml_folder: Path, tmp_path: Path) -> None:
    plan = plan_run(tiny_experiment(tmp_path, tokenizer=chatml_folder))
    assert plan["steps"] == 12
    assert plan["data"]["train"]["documents"] > plan["data"]["validation"]["documents"] > 0
    assert plan["base_parameters"] == plan["trained_parameters"] > 10_000
    assert not (tmp_path / "run").exists()


def test_held_out_text_that_is_trained_on_is_said(
    chatml_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The training text named as validation_file gave splendid bits per byte, and nobody said a word."""
    write_jsonl(tmp_path / "held.jsonl", [*documents(120)[:3], *documents(4, seed=9)])
    config = tiny_experiment(
        tmp_path, tokenizer=chatml_folder, data__validation_file=str(tmp_path / "held.jsonl"), training__max_steps=2
    )
    report = run_training(config)
    said = capsys.readouterr().err
    assert "3 of 7 held-out documents are trained on too" in said
    assert "3 held-out documents are trained on too: what is measured on them is memory." in report.notes
    assert "7 held out" in said
    assert "of which 3 are trained on too" in said


REFUSED: dict[str, tuple[dict[str, Any], type[FoundryError], str]] = {
    "no text": ({"data__train_file": None}, ConfigError, "no training text is named"),
    "a vocabulary without room": ({"model__vocab_size": 300}, ConfigError, "vocab"),
    "a chunk beyond the context": ({"data__max_length": 64}, ConfigError, "max_position_embeddings"),
    "nothing held out, and a bound on it": (
        {"data__validation_share": 0.0, "criteria__bits_per_byte": 2.0}, ConfigError, "no held-out text",
    ),
    "a sample beyond the context": (
        {"evaluation": {"prompts": ["the fox"], "max_new_tokens": 30}}, ConfigError, "exceed the model's context",
    ),
    "two lengths": ({"training__epochs": 2}, ConfigError, "training.epochs and training.max_steps both say"),
    "a save that would never come": (
        {"training__save_schedule": "explicit", "training__save_at": [3, 13]}, ConfigError,
        "training.save_at: step 13 is beyond the last of 12 steps",
    ),
    "warm-up of the only step": (
        {"training__max_steps": None, "training__max_tokens": 32, "training__warmup_steps": 9}, ConfigError,
        "9 warm-up steps leave nothing of 1 step",
    ),
    "a separator that is no token": ({"data__separator": "<nothing>"}, DataError, "is not a token of its own"),
    "no tokenizer there": ({"tokenizer__name": "nowhere/at-all/here"}, ModelError, "nowhere"),
    "nothing but one document": ({"data__train_file": "one.jsonl"}, DataError, r"one\.jsonl: no document falls on"),
    "no documents": ({"data__train_file": "none.jsonl"}, DataError, r"none\.jsonl: the input holds no records"),
    "no documents held out": (
        {"data__validation_file": "none.jsonl"}, DataError, r"none\.jsonl: the input holds no records",
    ),
    "an empty file of text": ({"data__train_file": "none.txt"}, DataError, "none.txt.*Give documents that hold text"),
    "a folder without a tokenizer": ({"tokenizer__name": "empty"}, ModelError, "no tokenizer.*foundry tokenizer train"),
    "heads that do not divide the width": ({"model__num_attention_heads": 3}, ConfigError, "does not divide"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_by_name(
    chatml_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """Each before there is a run in the way."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "one.jsonl", documents(1))
    write_jsonl(tmp_path / "none.jsonl", [])
    (tmp_path / "none.txt").touch()
    (tmp_path / "empty").mkdir()
    changes, kind, words = REFUSED[case]
    with pytest.raises(kind, match=f"(?s){words}"):
        run_training(tiny_experiment(tmp_path, tokenizer=chatml_folder, **changes))
    assert not (tmp_path / "run").exists()


def test_shards_of_another_tokenizer_are_refused(chatml_folder: Path, tmp_path: Path) -> None:
    """Its ids mean other words; a loss would fall all the same."""
    other = save_folder(
        tmp_path / "other", byte_level_tokenizer(["<|endoftext|>"], vocab_size=300), eos_token="<|endoftext|>"
    )
    source = write_jsonl(tmp_path / "text.jsonl", documents(60))
    pack(source, tmp_path / "shards", other, kind="text", max_length=32)
    config = tiny_experiment(tmp_path / "a", tokenizer=chatml_folder, data__train_file=str(tmp_path / "shards"))
    with pytest.raises(DataError, match="another tokenizer"):
        run_training(config)


def test_a_missing_shard_is_named_before_the_first_step(chatml_folder: Path, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "text.jsonl", documents(1200))
    pack(source, tmp_path / "shards", chatml_folder, kind="text", max_length=32, shard_tokens=4096)
    (tmp_path / "shards" / "shard-00001.tokens").unlink()
    config = tiny_experiment(tmp_path / "a", tokenizer=chatml_folder, data__train_file=str(tmp_path / "shards"))
    with pytest.raises(DataError, match=r"shard-00001\.tokens is missing"):
        run_training(config)


def test_a_damaged_shard_is_named_before_the_first_step(chatml_folder: Path, tmp_path: Path) -> None:
    """As many bytes, other tokens: the run would learn them, or end where one is outside the vocabulary."""
    source = write_jsonl(tmp_path / "text.jsonl", documents(60))
    pack(source, tmp_path / "shards", chatml_folder, kind="text", max_length=32)
    shard = tmp_path / "shards" / "shard-00000.tokens"
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    config = tiny_experiment(tmp_path / "a", tokenizer=chatml_folder, data__train_file=str(tmp_path / "shards"))
    with pytest.raises(DataError, match=r"shard-00000\.tokens is damaged"):
        run_training(config)


def test_a_model_too_large_for_this_machine_is_planned_by_its_shape(chatml_folder: Path, tmp_path: Path) -> None:
    """Drawing its weights to say that they do not fit would fill the disk first."""
    model = {"num_hidden_layers": 400, "hidden_size": 16384, "num_attention_heads": 64, "max_position_embeddings": 64}
    plan = plan_run(tiny_experiment(tmp_path, tokenizer=chatml_folder, model=model))
    assert plan["num_parameters"] > 10**12
    assert plan["measured"] is False
    assert not (tmp_path / "work").exists()


def test_float16_has_its_scale_in_the_records_and_repeats_to_the_bit(chatml_folder: Path, tmp_path: Path) -> None:
    """The scale goes through the checkpoint: repeated from the middle, the last steps are the same."""
    model = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 32}
    curves = {}
    for dtype in ("float32", "float16"):
        config = tiny_experiment(
            tmp_path / dtype, tokenizer=chatml_folder, model=model | {"dtype": dtype},
            criteria={"below_unigram": None, "replay_steps": 6},
        )  # fmt: skip
        report = run_training(config)
        assert report.verdict == "passed", report.checks
        curves[dtype] = [
            each for each in read_metrics(config.run_dir / "metrics.jsonl") if each["kind"] == "step"
        ]  # fmt: skip
    assert [each["loss"] for each in curves["float16"]] == pytest.approx(
        [each["loss"] for each in curves["float32"]], rel=1e-2
    )
    assert {each["loss_scale"] for each in curves["float16"]} == {65536.0}
    assert all("loss_scale" not in each for each in curves["float32"])
