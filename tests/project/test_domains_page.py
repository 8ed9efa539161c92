"""The domains that docs/domains.md shows are configurations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from model_foundry.config.generate import GenerateConfig
from model_foundry.config.load import load_config

ROOT = Path(__file__).parents[2]
SHOWN = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "domains.md").read_text(encoding="utf-8"), re.S | re.M)


def test_the_page_shows_two_domains() -> None:
    assert len(SHOWN) == 2


@pytest.mark.parametrize("text", SHOWN)
def test_a_domain_on_the_page_is_a_configuration(text: str, tmp_path: Path) -> None:
    path = tmp_path / "domain.yaml"
    path.write_text(text.replace("configs/domains/base.yaml", str(ROOT / "configs/domains/base.yaml")), "utf-8")
    resolved = load_config(GenerateConfig, path=path)
    assert not resolved.warnings
    assert resolved.config.corpus.about
