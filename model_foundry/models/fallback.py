"""Architectures the native decoder does not know (GPT-2, Gemma, Phi, ...), run by transformers behind the same seam.

Beside `gguf` this is the only module that imports transformers, and only when such a model is loaded. No remote code
runs, no pickle is opened, no weight is left at random values, every dropout is zero, and a model whose logits depend
on later tokens is refused. It does not know LoRA, losses or the engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from model_foundry.errors import ModelError
from model_foundry.models.attention import Attention
from model_foundry.models.folder import read_config, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersModel(nn.Module):
    """A causal model of transformers with the calls the engine makes.

    Attributes:
        model: the transformers model; replace its linear layers to adapt them.
        attention: the attention implementation transformers chose (`sdpa`, `eager`).
        notes: what was set differently from the folder, one sentence each.
    """

    def __init__(self, model: PreTrainedModel, *, notes: Sequence[str] = ()) -> None:
        super().__init__()
        self.model = model
        self.attention = str(getattr(model.config, "_attn_implementation", "eager"))
        self.notes = tuple(notes)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def logits(self, tokens_list: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Logits of every position of every row.

        Rows are padded on the right; nothing looks to the right in a causal model, so each row's logits are what it
        would have alone.

        Args:
            tokens_list: rows of int64 [T_i], T_i ≥ 1.

        Returns:
            One [T_i, V] tensor a row, in the model's dtype.
        """
        lengths = [int(tokens.shape[0]) for tokens in tokens_list]
        input_ids = pad_sequence(list(tokens_list), batch_first=True).to(self.model.device)
        positions = torch.arange(max(lengths), device=input_ids.device)
        mask = (positions[None, :] < torch.tensor(lengths, device=input_ids.device)[:, None]).long()
        out = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        return [out.logits[row, :length] for row, length in enumerate(lengths)]

    @torch.no_grad()
    def start(self, prompt: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Read a prompt (int64 [T]); the logits [V] of the token after it, and the cache to go on with."""
        prompt = prompt.to(self.model.device)
        out = self.model(input_ids=prompt[None], use_cache=True)
        # State-space models keep their state in ways of their own: without a cache the text is read again every time.
        cache = getattr(out, "past_key_values", None)
        return out.logits[0, -1], prompt if cache is None else cache

    @torch.no_grad()
    def step(self, token: int, cache: Any) -> tuple[torch.Tensor, Any]:
        """Append one token; the logits [V] of the token after it, and the cache to use from now on."""
        new = torch.tensor([token], device=self.model.device)
        if isinstance(cache, torch.Tensor):
            return self.start(torch.cat([cache, new]))
        out = self.model(input_ids=new[None], past_key_values=cache, use_cache=True)
        return out.logits[0, -1], out.past_key_values

    def linear_modules(self) -> dict[str, nn.Module]:
        """Every nn.Linear and Conv1D by its name inside `model`, the output head left out.

        A Conv1D (GPT-2) computes x @ weight + bias with weight [in, out], the transpose of nn.Linear's.
        """
        from transformers.pytorch_utils import Conv1D

        head = self.model.get_output_embeddings()
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head
        }

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each layer in the backward pass; takes effect in training mode."""
        self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights by the names they have in a Hugging Face folder, tied copies left out; for `write_model_folder`."""
        from transformers.core_model_loading import revert_weight_conversion

        tied = set(self.model.all_tied_weights_keys)
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in tied}
        yield from revert_weight_conversion(self.model, state).items()


def load_transformers_model(
    folder: Path, dtype: torch.dtype, device: torch.device | str, *, attention: Attention = "auto"
) -> TransformersModel:
    """Load a folder's causal language model through transformers.

    Args:
        attention: `eager` is what it says; else transformers takes its sdpa, where the architecture has it.

    Raises:
        ModelError: the architecture needs remote code, is unknown, is not a causal language model, or does not fit
            the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = read_config(folder)
    refuse_foreign_code(raw, where=folder)
    stored_tensors(folder)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    with _quiet():
        try:
            config = AutoConfig.from_pretrained(folder, **options)
            notes = _silence_dropout(config)
            options |= {"config": config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
            options |= {"attn_implementation": "eager"} if attention == "eager" else {}
            loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
        except (ValueError, KeyError, ImportError, OSError, RuntimeError) as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"transformers cannot load it ({text})", where=str(folder)) from error
    model, loading = loaded
    notes += _check_loading(loading, folder)
    notes += _fused_experts(model)
    model.to(device)
    model.eval()
    wrapped = TransformersModel(model, notes=notes)
    if attention not in ("auto", wrapped.attention):
        wrapped.notes += (f"attention is computed by {wrapped.attention}; {attention} is not offered by transformers",)
    _check_causal(wrapped, folder)
    return wrapped


def refuse_foreign_code(config: Mapping[str, Any], *, where: Path) -> None:
    """Refuse a model that only runs with Python code from its own folder.

    Raises:
        ModelError: transformers does not know the `model_type` itself, or the language model class is the folder's own.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if config.get("auto_map"):
        what = f"the architecture {kind!r} needs Python code from the model's folder, and such code is never run here"
        raise ModelError(what, where=str(where), hint="Choose a model whose architecture transformers has built in.")
    if kind not in CONFIG_MAPPING_NAMES:
        hint = "A newer transformers may know it: pip install -U transformers"
        raise ModelError(f"the architecture {kind!r} is not known to transformers", where=str(where), hint=hint)
    raise ModelError(f"{kind!r} is not a causal language model", where=str(where))


def _silence_dropout(config: Any) -> list[str]:
    """Set every dropout rate to zero: it draws from hidden random state, and a run could not be repeated."""
    rates = {
        key: value
        for key, value in config.to_dict().items()
        if ("drop" in key or key.endswith("_pdrop")) and isinstance(value, float) and value > 0
    }
    for key in rates:
        setattr(config, key, 0.0)
    return [f"{', '.join(sorted(rates))} set to 0, so that a run can be repeated"] if rates else []


def _check_loading(loading: Mapping[str, Any], folder: Path) -> list[str]:
    """A weight that the folder lacks would be random, and nobody would notice."""
    wrong = {"missing": loading.get("missing_keys"), "of another shape": loading.get("mismatched_keys")}
    for what, keys in wrong.items():
        if keys:
            example = sorted(str(key) for key in keys)[0]
            raise ModelError(f"{len(keys)} weights are {what}, {example} first", where=str(folder))
    unused = sorted(str(key) for key in loading.get("unexpected_keys") or ())
    return [f"{len(unused)} stored tensors are not part of the language model, {unused[0]} first"] if unused else []


def _fused_experts(model: nn.Module) -> list[str]:
    """transformers keeps a mixture's experts in one tensor a layer: not linear layers, so no adapter goes on them."""
    num = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 3 and "expert" in name)
    what = f"{num:,} weights of experts are not linear modules in transformers, so LoRA leaves them as they are"
    return [f"{what} (all-linear included), and their load is not balanced in training"] if num else []


@torch.no_grad()
def _check_causal(model: TransformersModel, folder: Path) -> None:
    """Change the last token, and see that nothing before it moves."""
    first = torch.arange(5, 11) % model.vocab_size
    second = first.clone()
    second[-1] = (second[-1] + 1) % model.vocab_size
    before, after = (model.logits([tokens])[0][:-1].float() for tokens in (first, second))
    if before.isnan().any():
        what = "its logits are no numbers: its weights hold NaN or infinity, or overflow"
        raise ModelError(what, where=str(folder), hint="Take an earlier checkpoint, or another copy.")
    if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        what = "its logits depend on later tokens, so it is not a causal language model"
        raise ModelError(what, where=str(folder), hint="An encoder (BERT and the like) cannot be trained this way.")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars or advice from transformers on our console; its settings are put back."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
