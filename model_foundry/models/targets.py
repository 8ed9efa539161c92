"""Which linear layers carry an adapter, by PEFT's rules, and putting it there.

It knows names and groups of layers. It does not know what an adapter computes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from model_foundry.errors import ModelError
from model_foundry.models.lora import Adaptable
from model_foundry.models.randomness import DropoutCounter
from model_foundry.types import LoraConfig

logger = logging.getLogger(__name__)

Layer = TypeVar("Layer", bound=Adaptable)


def select_targets(
    layers: Mapping[str, Adaptable], target_modules: str | Sequence[str], *, every_target: bool = True
) -> list[str]:
    """The linear layers that `target_modules` names, by PEFT's rules.

    Args:
        layers: those that can be adapted, by full name.
        target_modules: `all-linear` (every one but routers and the head), a regular expression over the full name, or
            name endings.
        every_target: each name ending must match a layer. PEFT asks only that one of them does, so a stored adapter
            may name more.

    Raises:
        ModelError: a name that matches nothing; the choices are listed.
    """
    if isinstance(target_modules, str) and target_modules.lower() == "all-linear":
        return [name for name, layer in layers.items() if not (layer.is_router or layer.is_head)]
    return matching_names(list(layers), target_modules, every_target=every_target)


def matching_names(
    names: Sequence[str], target_modules: str | Sequence[str], *, every_target: bool = True
) -> list[str]:
    """`select_targets` on names alone, for all but `all-linear`."""
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    hint = f"Name some of {', '.join(endings)}, or use all-linear."
    if isinstance(target_modules, str):
        try:
            chosen = [name for name in names if re.fullmatch(target_modules, name)]
        except re.error as error:
            raise ModelError(f"not a regular expression ({error})", where="lora.target_modules", hint=hint) from error
        if not chosen:
            raise ModelError(f"{target_modules!r} matches no linear layer", where="lora.target_modules", hint=hint)
        return chosen
    chosen_set: set[str] = set()
    for target in target_modules:
        found = {name for name in names if name == target or name.endswith("." + target)}
        if not found and every_target:
            raise ModelError(f"{target!r} matches no linear layer", where="lora.target_modules", hint=hint)
        chosen_set |= found
    if not chosen_set:
        what = f"{', '.join(map(repr, target_modules)) or 'an empty list'} matches no linear layer"
        raise ModelError(what, where="lora.target_modules", hint=hint)
    return [name for name in names if name in chosen_set]


def adapt(
    layers: Mapping[str, Layer], lora: LoraConfig, *, seed: int, counter: DropoutCounter, every_target: bool = True
) -> dict[str, Layer]:
    """Put a fresh adapter on every layer that `lora.target_modules` names; returns those layers by name.

    Raises:
        ModelError: a name that matches nothing, a part of a layer's experts, or an option that experts do not have.
    """
    chosen = select_targets(layers, lora.target_modules, every_target=every_target)
    _check_groups(layers, chosen, lora)
    for name in chosen:
        layers[name].adapt(lora, name=name, seed=seed, counter=counter)
    if (what := peft_obstacle(layers, chosen)) is not None:
        logger.warning("lora.target_modules: peft with transformers 5 cannot use this adapter: %s", what)
    return {name: layers[name] for name in chosen}


def peft_obstacle(layers: Mapping[str, Adaptable], chosen: Sequence[str]) -> str | None:
    """Why PEFT, after transformers 5 has fused a model's experts, cannot use the adapter on these layers, or None.

    It maps the names `gate_proj`, `up_proj` and `down_proj` to the fused experts wherever a model of this kind has them
    (peft 0.21, `convert_peft_config_for_transformers`).
    """
    if not any(layer.group is not None for layer in layers.values()):
        return None
    for name in chosen:
        last = name.rsplit(".", 1)[-1]
        if last in ("gate_proj", "up_proj", "down_proj") and layers[name].group is None:
            return f"it takes {name}, of a layer without experts, for a name of experts"
    experts = {name.rsplit(".", 1)[-1] for name in chosen if layers[name].group is not None}
    if len(experts & {"gate_proj", "up_proj"}) == 1:
        return "it adapts the experts' gate_proj and up_proj together or not at all"
    return None


def _check_groups(layers: Mapping[str, Adaptable], chosen: list[str], lora: LoraConfig) -> None:
    parts = [layers[name] for name in chosen if layers[name].group is not None or layers[name].is_router]
    if not parts:
        return
    # transformers keeps a layer's experts in one tensor, and the router as well; PEFT has neither option for those.
    hint = "Switch it off, or leave experts and routers out of lora.target_modules."
    if lora.use_dora:
        raise ModelError("PEFT has no DoRA for experts and routers", where="lora.use_dora", hint=hint)
    if lora.lora_dropout:
        raise ModelError("PEFT has no dropout for experts and routers", where="lora.lora_dropout", hint=hint)
    wanted = {id(layer.group) for layer in parts if layer.group is not None}
    for name in sorted(layers.keys() - set(chosen)):
        if id(layers[name].group) in wanted:
            what = f"it leaves out {name} and adapts other experts of the same layer"
            raise ModelError(what, where="lora.target_modules", hint="Name all experts of a layer, or none.")
