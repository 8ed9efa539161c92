"""The shape of a mixture of experts, read from and written to a Hugging Face `config.json`.

It knows numbers and keys. It does not know torch, weights, or the layers around the experts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from model_foundry.models.json_fields import JsonFields


@dataclass(frozen=True, slots=True)
class MixtureConfig:
    """Mixture of experts in place of the MLP of some layers (Shazeer et al. 2017; Qwen3-MoE).

    Attributes:
        num_experts_per_tok: experts that a token is sent to, those of the highest probability.
        moe_intermediate_size: inner width of one expert.
        norm_topk_prob: the chosen experts' weights are divided by their sum.
        decoder_sparse_step: every so many layers one has experts: layers step - 1, 2 step - 1, ...
        mlp_only_layers: layers that keep a plain MLP all the same.
        router_aux_loss_coef: factor of the load-balancing loss (Fedus et al. 2021, equations 4 to 6).
        output_router_logits: that loss is part of the training loss; transformers' name for it.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False

    @property
    def balance_coefficient(self) -> float:
        """Factor of the load-balancing loss in training; 0 where it is off."""
        return self.router_aux_loss_coef if self.output_router_logits else 0.0

    def to_hf(self) -> dict[str, Any]:
        """Keys of `config.json`; the number of experts under the names of transformers 4 and 5, for every reader."""
        keys = asdict(self) | {"mlp_only_layers": list(self.mlp_only_layers)}
        return keys | {"num_local_experts": self.num_experts}


def read_mixture(reader: JsonFields) -> MixtureConfig | None:
    """None where there are no experts: then every layer has a plain MLP, as in transformers.

    Raises:
        ModelError: a key is missing or impossible.
    """
    new_name_only = "num_local_experts" in reader.values and "num_experts" not in reader.values
    key = "num_local_experts" if new_name_only else "num_experts"
    if reader.get(key) == 0:
        return None
    num_experts, chosen = reader.integer(key), reader.integer("num_experts_per_tok")
    if chosen > num_experts:
        raise reader.wrong("num_experts_per_tok", chosen, f"at most the number of experts ({num_experts})")
    plain = reader.get("mlp_only_layers") or []
    if not isinstance(plain, list | tuple) or not all(type(layer) is int for layer in plain):
        raise reader.wrong("mlp_only_layers", plain, "a list of layer numbers")
    return MixtureConfig(
        num_experts=num_experts,
        num_experts_per_tok=chosen,
        moe_intermediate_size=reader.integer("moe_intermediate_size"),
        norm_topk_prob=reader.flag("norm_topk_prob"),
        decoder_sparse_step=reader.integer("decoder_sparse_step", 1),
        mlp_only_layers=tuple(plain),
        router_aux_loss_coef=reader.number("router_aux_loss_coef", 0.001),
        output_router_logits=reader.flag("output_router_logits"),
    )
