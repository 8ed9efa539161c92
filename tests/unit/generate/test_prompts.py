"""Prompts and requests: their words, their identity and their bounds."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_foundry.errors import ConfigError
from model_foundry.generate.prompts import Prompt, choose_template
from model_foundry.generate.requests import body_bytes, max_input_tokens, unit_from_json, unit_to_json
from tests.generation_rig import code_unit, make_recipe


def test_placeholders_inside_code_stay_as_they_are() -> None:
    """Prevents code that happens to hold {name} from being rewritten on its way to the model."""
    unit = code_unit(1, code="print('{name} {code} {nonsense}')")
    message = Prompt().render(unit)
    assert "print('{name} {code} {nonsense}')" in message
    assert "Name: rule_1" in message
    assert '{"questions": [' in message  # braces that are no placeholder


def test_context_and_concepts_are_quoted_where_they_concern_the_code() -> None:
    prompt = Prompt(concepts={"Sector": "a place", "Entity": "a thing"}, about="a game")
    message = prompt.render(replace(code_unit(1, code="Sector().name"), context="Rules", comment=""))
    assert "Sector: a place" in message
    assert "Entity: a thing" not in message
    assert "Stands in: Rules" in message
    assert "author's comment" not in message


def test_a_template_that_cannot_be_filled_is_refused() -> None:
    with pytest.raises(ConfigError, match="launguage"):
        Prompt(template="{launguage} {code}")
    with pytest.raises(ConfigError, match="does not contain"):
        Prompt(template="Ask something.")
    with pytest.raises(ConfigError, match="no prompt version 'reverse-9'"):
        choose_template("reverse-9", None)


def test_the_identity_of_a_request_is_what_decides_its_reply() -> None:
    """Prevents paying twice for the same code in two files, and keeping a reply to words that were changed since."""
    recipe = make_recipe()
    unit = code_unit(1)
    assert recipe.key(unit) == recipe.key(replace(unit, path="elsewhere.lua", first_line=90))
    others = [
        recipe.key(code_unit(2)),
        make_recipe(max_tokens=401).key(unit),
        make_recipe(model="claude-opus-5").key(unit),
        make_recipe(effort="low").key(unit),
        make_recipe(structured=False).key(unit),
        make_recipe(prompt=replace(recipe.prompt, system="Be kind.")).key(unit),
        make_recipe(prompt=replace(recipe.prompt, voices={"beginner": "simply"})).key(unit),
    ]
    assert len({recipe.key(unit), *others}) == 8


def test_parameters_left_to_the_model_are_left_out() -> None:
    """Prevents a 400 from a model that does not know the parameter."""
    assert set(make_recipe(structured=False).params(code_unit(1))) == {"model", "max_tokens", "system", "messages"}
    params = make_recipe(effort="low", thinking="disabled").params(code_unit(1))
    assert params["output_config"]["effort"] == "low"
    assert params["output_config"]["format"]["schema"]["required"] == ["questions"]
    assert params["thinking"] == {"type": "disabled"}


@given(code=st.text(min_size=1, max_size=300))
def test_bounds_hold_for_any_code(code: str) -> None:
    """Prevents a reservation below what a prompt can be, and a batch above the API's bytes."""
    recipe = make_recipe()
    params = recipe.params(code_unit(1, code=code))
    text = params["system"] + params["messages"][0]["content"]
    assert max_input_tokens(params) > len(text.encode("utf-8", "replace"))
    request = json.dumps({"custom_id": "a" * 50, "params": params}, ensure_ascii=False).encode("utf-8", "replace")
    assert body_bytes(params, "a" * 50) >= len(request) + 1


def test_a_unit_survives_the_ledger_byte_for_byte() -> None:
    unit = code_unit(3)
    assert unit_from_json(unit_to_json(unit)) == unit
    later = json.loads(unit_to_json(unit)) | {"a_field_of_the_future": 1}
    assert unit_from_json(json.dumps(later)) == unit
