"""What a domain's YAML may say: mappings, lists of folders, and rules between fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from model_foundry.config.dump import dump_yaml
from model_foundry.config.generate import GenerateConfig
from model_foundry.config.load import Resolved, load_config
from model_foundry.errors import ConfigError


def load(folder: Path, text: str, *overrides: str) -> Resolved[GenerateConfig]:
    path = folder / "domain.yaml"
    path.write_text(text)
    return load_config(GenerateConfig, path=path, overrides=overrides)


def test_folders_in_a_list_are_found_beside_the_file_that_names_them(tmp_path: Path) -> None:
    """A domain in somebody's home must work from any working directory, as single files do."""
    (tmp_path / "scripts").mkdir()
    resolved = load(tmp_path, "corpus:\n  roots: [scripts, /somewhere]\n")
    assert resolved.config.corpus.roots == (tmp_path / "scripts", Path("/somewhere"))


def test_concepts_add_up_over_inherited_files_and_say_where_they_come_from(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("corpus:\n  concepts:\n    one: first\n    two: second\n")
    resolved = load(tmp_path, "inherits: base.yaml\ncorpus:\n  concepts:\n    two: other\n    three: third\n")
    assert resolved.config.corpus.concepts == {"one": "first", "two": "other", "three": "third"}
    assert resolved.provenance["corpus.concepts"].startswith("file ")
    assert resolved.provenance["corpus.grammar.units"] == "default"
    assert load(tmp_path, "corpus: {}\n").provenance["corpus.concepts"] == "default"


def test_a_domain_written_out_reads_back_the_same(tmp_path: Path) -> None:
    domain = Path(__file__).parents[3] / "configs" / "domains" / "avorion_lua.yaml"
    config = load_config(GenerateConfig, path=domain).config
    again = load(tmp_path, dump_yaml(config)).config
    assert again.corpus.model_copy(update={"roots": ()}) == config.corpus.model_copy(update={"roots": ()})


@pytest.mark.parametrize(
    "text, words",
    [
        ("corpus: {min_lines: 9, max_lines: 3}", "corpus.max_lines 3 is less than min_lines 9"),
        ("corpus: {concepts: [a, b]}", "expected a mapping, each value text"),
        ("corpus: {concepts: {a: [b]}}", "expected a mapping, each value text"),
        ("corpus: {roots: src}", "Write a list: [src]"),
        ("corpus: {language: lue}", "the language lue is not built in (lua, gdscript)"),
        ("corpus: {comments: [block, docs]}", "expected a list, each one of doc, line, block"),
        ("corpus: {grammar: {unit: {}}}", "Did you mean corpus.grammar.units?"),
    ],
)
def test_a_wrong_domain_is_named(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert words in str(caught.value)
