"""Layers in their order, each value with its origin, parents found or named, nothing ignored without a word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.config.load import Resolved, load_config
from model_foundry.config.pretrain import ExperimentConfig
from model_foundry.config.schema import ChatConfig, EvaluateConfig, TrainConfig
from model_foundry.errors import ConfigError, UsageError


def load(path: Path | None = None, *overrides: str, environ: dict[str, str] | None = None) -> Resolved[TrainConfig]:
    return load_config(TrainConfig, path=path, overrides=overrides, environ=environ or {})


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_the_layers_lie_in_their_order(tmp_path: Path) -> None:
    """defaults < profile < parent < file < environment < override, one field for each to win."""
    write(
        tmp_path / "base.yaml",
        "inherits: code\ntraining: {epochs: 7, batch_size: 7, learning_rate: 0.07, save_steps: 7, eval_steps: 0}\n",
    )
    path = write(
        tmp_path / "run.yaml",
        "inherits: base.yaml\ntraining:\n  batch_size: 6\n  learning_rate: 0.06\n  save_steps: 6\n",
    )
    resolved = load(
        path,
        "training.save_steps=4",
        environ={"TRAINING_LEARNING_RATE": "5e-5", "TRAINING_SAVE_STEPS": "5", "FOUNDRY_SEED": "9"},
    )
    training = resolved.config.training
    assert (training.warmup_ratio, training.epochs, training.batch_size) == (0.05, 7, 6)
    assert (training.learning_rate, training.save_steps, resolved.config.seed) == (5e-5, 4, 9)
    assert resolved.provenance["training.weight_decay"] == "default"
    assert resolved.provenance["training.warmup_ratio"] == "profile code"
    assert resolved.provenance["training.epochs"] == f"file {tmp_path / 'base.yaml'}:2"
    assert resolved.provenance["training.batch_size"] == f"file {path}:3"
    assert resolved.provenance["training.learning_rate"] == "environment TRAINING_LEARNING_RATE"
    assert resolved.provenance["training.save_steps"] == "override"
    assert resolved.hidden["training.save_steps"] == (
        "environment TRAINING_SAVE_STEPS",
        f"file {path}:5",
        f"file {tmp_path / 'base.yaml'}:2",
    )
    assert resolved.warnings == ()


LENGTHS: dict[str, tuple[str, tuple[str, ...], dict[str, str], str]] = {
    "steps over a file's epochs": ("epochs: 3", ("training.max_steps=5",), {}, "max_steps=5"),
    "epochs over a file's steps": ("max_steps: 5", ("training.epochs=3",), {}, "epochs=3.0"),
    "tokens over a file's steps": ("max_steps: 5", ("training.max_tokens=900",), {}, "max_tokens=900"),
    "steps of the environment over a file's tokens": ("max_tokens: 9", (), {"TRAINING_MAX_STEPS": "7"}, "max_steps=7"),
    "null gives nothing": ("max_tokens: 9", ("training.epochs=null",), {}, "max_tokens=9"),
}


@pytest.mark.parametrize("case", LENGTHS)
def test_the_last_layer_that_says_how_long_to_train_decides(case: str, tmp_path: Path) -> None:
    """Prevents `training.epochs=3` on the command line being ignored for the max_steps of a file."""
    written, overrides, environ, wanted = LENGTHS[case]
    path = write(tmp_path / "a.yaml", f"method: pretrain\ntokenizer: t\ntraining:\n  {written}\n")
    resolved = load_config(ExperimentConfig, path=path, overrides=overrides, environ=environ)
    training = resolved.config.training
    given = [f"{name}={getattr(training, name)}" for name in training.alternatives if getattr(training, name)]
    assert given == [wanted]
    if overrides != ("training.epochs=null",):
        assert f"(over file {path}:4)" in resolved.explain()


def test_a_method_that_knows_two_lengths_keeps_its_own_way(tmp_path: Path) -> None:
    """Fine-tuning takes max_steps over epochs within a layer, and the later layer between two."""
    both = write(tmp_path / "both.yaml", "training: {max_steps: 5, epochs: 2}\n")
    assert (load(both).config.training.max_steps, load(both).config.training.epochs) == (5, 2)
    above = load(write(tmp_path / "above.yaml", "inherits: both.yaml\ntraining: {epochs: 4}\n")).config.training
    assert (above.max_steps, above.epochs) == (None, 4)
    # Epochs give way by themselves here, and stay as they were written: a run's own file is compared with them.
    steps = load(write(tmp_path / "epochs.yaml", "training: {epochs: 5}\n"), "training.max_steps=10").config.training
    assert (steps.max_steps, steps.epochs) == (10, 5)


def test_two_lengths_in_one_layer_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "method: pretrain\ntokenizer: t\ntraining: {epochs: 2, max_steps: 5}\n")
    with pytest.raises(ConfigError, match=r"training\.epochs and training\.max_steps both say how long to train"):
        load_config(ExperimentConfig, path=path)


def test_provenance_covers_every_field_and_explain_shows_each() -> None:
    resolved = load(None, "training.learning_rate=5e-5")
    lines = resolved.explain().splitlines()
    assert len(lines) == len(resolved.provenance) > 50
    assert any(line.startswith("training.learning_rate = 5e-05") and line.endswith("override") for line in lines)


def test_a_summary_names_all_that_had_a_say(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "inherits: chat\n")
    resolved = load(path, "seed=1", "run_dir=x", environ={"LORA_R": "4"})
    assert resolved.summary() == f"{path}, profile chat, environment LORA_R, 2 overrides"


def test_later_parents_win_and_a_parent_may_be_shared(tmp_path: Path) -> None:
    """A diamond is no cycle."""
    write(tmp_path / "root.yaml", "seed: 1\nlora: {r: 2}\n")
    write(tmp_path / "left.yaml", "inherits: root.yaml\nlora: {r: 3}\n")
    write(tmp_path / "right.yaml", "inherits: root.yaml\nlora: {lora_alpha: 5}\n")
    path = write(tmp_path / "a.yaml", "inherits: [left.yaml, right.yaml]\n")
    config = load(path).config
    assert (config.seed, config.lora.r, config.lora.lora_alpha) == (1, 2, 5.0)


def test_parents_are_found_beside_the_file_that_names_them(tmp_path: Path) -> None:
    write(tmp_path / "shared/base.yaml", "inherits: deeper/root.yaml\n")
    write(tmp_path / "shared/deeper/root.yaml", "seed: 5\n")
    assert load(write(tmp_path / "runs/a.yaml", "inherits: ../shared/base.yaml\n")).config.seed == 5


def test_an_inheritance_cycle_is_shown_as_a_chain(tmp_path: Path) -> None:
    write(tmp_path / "b.yaml", "seed: 1\ninherits: c.yaml\n")
    write(tmp_path / "c.yaml", "inherits: b.yaml\n")
    path = write(tmp_path / "a.yaml", "inherits: b.yaml\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    chain = caught.value.what.partition(": ")[2].split(" -> ")
    assert [Path(link).name for link in chain] == ["b.yaml", "c.yaml", "b.yaml"]
    assert caught.value.where == f"{tmp_path / 'c.yaml'}:1"


@pytest.mark.parametrize("text", ["inherits: a.yaml\n", "inherits: ./a.yaml\n", "inherits: ../x/a.yaml\n"])
def test_a_file_cannot_inherit_itself(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="inherit each other"):
        load(write(tmp_path / "x" / "a.yaml", text))


def test_a_missing_parent_is_named_with_its_line_and_a_near_name(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "seed: 1\n")
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path / "a.yaml", "seed: 1\ninherits: bsae.yaml\n"))
    assert caught.value.where == f"{tmp_path / 'a.yaml'}:2"
    assert "base.yaml" in (caught.value.hint or "")


def test_a_misspelt_profile_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean the profile instruction"):
        load(write(tmp_path / "a.yaml", "inherits: instructions\n"))


@pytest.mark.parametrize("text", ["inherits: {a: 1}", "inherits: 5", "inherits: [chat, 3]", "inherits:"])
def test_inherits_takes_names(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="a profile, a path, or a list"):
        load(write(tmp_path / "a.yaml", f"{text}\n"))


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "demo.yaml", "seed: 1\n")
    with pytest.raises(ConfigError, match=r"no such file. Did you mean .*demo.yaml"):
        load(tmp_path / "dmeo.yaml")
    with pytest.raises(ConfigError, match="does not exist either"):
        load(tmp_path / "nowhere" / "demo.yaml")


def test_a_file_that_is_not_utf8_is_named_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"seed: 1\nrun_dir: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"a.yaml:2: not UTF-8 \(byte 0xe9\)"):
        load(tmp_path / "a.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfseed: 4\n")
    assert load(tmp_path / "a.yaml").config.seed == 4


def test_a_folder_and_a_huge_file_are_no_configurations(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "weights.yaml").write_bytes(b"\0" * 1_000_001)
    with pytest.raises(ConfigError, match="too many for a configuration"):
        load(tmp_path / "weights.yaml")


def test_an_empty_section_sets_nothing(tmp_path: Path) -> None:
    """All its lines commented out: it must not wipe what a parent set, nor fail."""
    path = write(tmp_path / "a.yaml", "inherits: code\nlora:\n  # r: 4\nseed: 1\n")
    assert load(path).config.lora.r == 32


def test_a_written_null_section_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"write lora.enabled: false") as caught:
        load(write(tmp_path / "a.yaml", "seed: 1\nlora: null\n"))
    assert caught.value.where == f"{tmp_path / 'a.yaml'}:2"


def test_null_switches_a_criterion_off_whatever_is_below(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "criteria: {loss_fall: 0.5}\n")
    path = write(tmp_path / "a.yaml", "inherits: base.yaml\ncriteria: {loss_fall: null}\n")
    assert load(path).config.criteria.loss_fall is None
    assert load(path, "criteria.loss_fall=0.1").config.criteria.loss_fall == 0.1
    assert load(path, "training.max_steps=").config.training.max_steps is None


def test_text_fields_keep_what_was_typed(tmp_path: Path) -> None:
    """A run named 007 or a project named 1e5 is a name, not a number."""
    path = write(tmp_path / "a.yaml", "logging: {project: 007}\nrun_dir: 2024\n")
    config = load(path, "model.name=1e5", "evaluation.system=Answer: [yes] or {no} # now").config
    assert (config.logging.project, config.run_dir, config.model.name) == ("007", Path("2024"), "1e5")
    assert config.evaluation.system == "Answer: [yes] or {no} # now"


def test_lists_and_mappings_from_overrides() -> None:
    config = load(
        None, "lora={r: 8, use_rslora: true}", "lora.target_modules=[q_proj, v_proj]", "training.save_at=[1, 2]",
        "training.save_schedule=explicit",
    ).config  # fmt: skip
    assert (config.lora.r, config.lora.use_rslora, config.lora.target_modules) == (8, True, ("q_proj", "v_proj"))
    assert config.training.save_at == (1, 2)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "runs/first", "007"])
def test_a_text_for_a_section_with_a_name_is_its_name(name: str, tmp_path: Path) -> None:
    """Prevents `model=NAME` from wiping out what a file says of the model besides."""
    path = tmp_path / "a.yaml"
    path.write_text("model: {template: chatml, name: other}\n", encoding="utf-8")
    resolved = load(path, f"model={name}")
    assert (resolved.config.model.name, resolved.config.model.template) == (name, "chatml")
    assert resolved.provenance["model.name"] == "override"
    assert resolved.hidden["model.name"] == (f"file {path}:1",)
    path.write_text(f"model: {name}\n", encoding="utf-8")
    assert load(path, "model.dtype=float32").config.model.name == name


@given(st.floats(min_value=1e-12, max_value=10, exclude_min=True))
def test_any_learning_rate_survives_environment_and_override(rate: float) -> None:
    assert load(None, f"training.learning_rate={rate!r}").config.training.learning_rate == rate
    environ = {"TRAINING_LEARNING_RATE": repr(rate)}
    assert load(None, environ=environ).config.training.learning_rate == rate


@given(st.text(alphabet=st.characters(exclude_characters="\"'"), min_size=1))
def test_any_system_message_survives_an_override(text: str) -> None:
    """Except what means null, and quotation marks, which quote."""
    found = load(None, f"evaluation.system={text}").config.evaluation.system
    assert found == (None if text in ("null", "Null", "NULL", "~") else text)


@pytest.mark.parametrize("argument", ["learning_rate", "=3", "a..b=1", "training.=1", "--x=1", ""])
def test_an_override_that_is_none_is_a_usage_error(argument: str) -> None:
    with pytest.raises(UsageError, match="is not key=value"):
        load(None, argument)


def test_the_last_of_two_overrides_wins_and_says_so() -> None:
    resolved = load(None, "seed=1", "seed=2")
    assert resolved.config.seed == 2
    assert resolved.warnings == ("override seed=1 gives way to seed=2",)


def variables(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "1")


@pytest.mark.parametrize(
    "name, meant",
    [
        ("TRAINING_LEARNING_RAT", "TRAINING_LEARNING_RATE"),
        ("TRAINING_LEARNINGRATE", "TRAINING_LEARNING_RATE"),
        ("TRAINING_LR", "TRAINING_LEARNING_RATE"),
        ("LORA_RANK", "LORA_R"),
        ("DATA_TRAIN_FLE", "DATA_TRAIN_FILE"),
        ("CRITERIA_LOSS_FAL", "CRITERIA_LOSS_FALL"),
        ("FOUNDRY_RUNDIR", "FOUNDRY_RUN_DIR"),
    ],
)
def test_a_variable_that_nearly_names_a_field_is_a_warning(name: str, meant: str) -> None:
    (warning,) = load(None, environ=variables(name)).warnings
    assert warning == f"environment variable {name} sets nothing; did you mean {meant}?"


def test_variables_of_others_are_left_alone() -> None:
    others = variables("PATH", "HOME", "MODEL_ZOO", "DATA_DIR", "FOUNDRY_DEBUG", "FOUNDRY_HOME", "FOUNDRY_OFFLINE")
    resolved = load(None, environ=others)
    assert resolved.warnings == ()
    assert set(resolved.provenance.values()) == {"default"}


def test_an_empty_variable_sets_nothing_and_says_so() -> None:
    resolved = load(None, environ={"TRAINING_MAX_STEPS": "", "FOUNDRY_SEED": " "})
    assert len(resolved.warnings) == 2
    assert resolved.config == TrainConfig()


def test_variables_belong_to_the_sections_of_the_command() -> None:
    """TRAINING_LEARNING_RATE in the shell must not break `foundry chat`."""
    resolved = load_config(
        ChatConfig, path=None, overrides=(), environ={"TRAINING_LEARNING_RATE": "1", "FOUNDRY_TOP_P": "0.5"}
    )
    assert resolved.config.top_p == 0.5
    assert resolved.warnings == ()


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "working"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def rows(path: Path, content: str = "{}\n") -> Path:
    return write(path, content)


def test_data_is_found_beside_the_yaml_that_names_it(elsewhere: Path, tmp_path: Path) -> None:
    """Also when a parent in another folder names it."""
    train = rows(tmp_path / "base" / "train.jsonl")
    write(tmp_path / "base" / "base.yaml", "data: {train_file: train.jsonl}\n")
    path = write(tmp_path / "mine" / "a.yaml", "inherits: ../base/base.yaml\nevaluation: {file: questions.jsonl}\n")
    config = load(path).config
    assert config.data.train_file is not None
    assert Path(config.data.train_file).samefile(train)
    assert config.evaluation.file == tmp_path / "mine" / "questions.jsonl"


def test_the_working_directory_comes_first_and_a_choice_is_said(elsewhere: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "data: {train_file: train.jsonl}\nmodel: {template: own.jinja}\n")
    rows(elsewhere / "train.jsonl")
    resolved = load(path)
    assert resolved.config.data.train_file == Path("train.jsonl")
    assert resolved.config.model.template == str(tmp_path / "own.jinja")
    assert resolved.warnings == ()
    rows(tmp_path / "train.jsonl")
    assert "is both in the working directory and in" in load(path).warnings[0]


def test_typed_paths_mean_the_working_directory(elsewhere: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "run_dir: runs/x\n")
    rows(tmp_path / "b.jsonl")
    config = load(path, "data.train_file=b.jsonl", environ={"DATA_VALIDATION_FILE": "c.jsonl"}).config
    assert (config.data.train_file, config.data.validation_file) == (Path("b.jsonl"), Path("c.jsonl"))
    assert config.run_dir == Path("runs/x")
    assert config.model.template == "auto"


@pytest.mark.parametrize("schema", [TrainConfig, EvaluateConfig, ChatConfig])
def test_defaults_alone_are_a_configuration(schema: type[TrainConfig]) -> None:
    overrides: Sequence[str] = ()
    assert load_config(schema, path=None, overrides=overrides, environ={}).config == schema()


def test_a_switch_that_may_be_left_open_can_be_set() -> None:
    """`batch.invariant=false` was refused as a number that is none, so that nobody could switch it off."""
    from model_foundry.config.serve import ServeConfig

    for text, value in {"false": False, "true": True, "null": None}.items():
        resolved = load_config(ServeConfig, path=None, overrides=[f"batch.invariant={text}"], environ={})
        assert resolved.config.batch.invariant is value
    with pytest.raises(ConfigError, match="a whole number"):
        load_config(ServeConfig, path=None, overrides=["batch.max_sequences=true"], environ={})
