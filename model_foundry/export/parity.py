"""Are two forms of one model the same model? Measured on prompts, with a bound for each precision.

Every form reads the same rows: a held-out prompt, and the reference's own greedy answer. Compared at the answer's
positions: logits (normalised mean square error), distributions (KL divergence), the choice of token; before that weight
by weight, so that what differs first has a name. It loads Hugging Face folders and GGUF files; it writes nothing.

Bounds follow from the format: an error of sixteen units of roundoff in the root mean square, for what the layers of a
network add up to. Block formats have no such unit; theirs are stated per format, and those of a weight per type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from model_foundry.engine.sampling import collect, stream_tokens
from model_foundry.errors import ModelError
from model_foundry.export.merge import Merge
from model_foundry.models.adapter import PREFIX, load_adapter_tensors, read_adapter_config, read_adapter_tensors
from model_foundry.models.config import HEAD_LAYER, ModelConfig
from model_foundry.models.folder import read_config, read_tensors
from model_foundry.models.language_model import LanguageModel, load_language_model
from model_foundry.models.randomness import DropoutCounter
from model_foundry.models.targets import adapt
from model_foundry.rendering import Renderer
from model_foundry.tokenizer import Tokenizer
from model_foundry.types import Check, Message, SamplingParams

ANSWER_TOKENS = 16
LEAST_ANSWER = 4
"""Tokens that the context must have room for after a prompt."""
LEAST_EFFECT = 4.0
"""An adapter must move the logits by so many times what the export does, in the mean square."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a precision may cost.

    Attributes:
        logits: normalised mean square error of the logits.
        kl: mean KL divergence in nats for each predicted token.
        agreement: share of an answer's tokens that must be chosen alike, near ties aside.
    """

    logits: float
    kl: float
    agreement: float


def _rounded(unit: float) -> Bounds:
    least = 1e-8  # float32 arithmetic in another order
    return Bounds(max((16 * unit) ** 2, least), max((16 * unit) ** 2, least) * 10, 1.0)


_UNITS = {"float32": 2**-24, "f32": 2**-24, "float16": 2**-11, "f16": 2**-11, "bfloat16": 2**-8, "bf16": 2**-8}
BOUNDS: dict[str, Bounds] = {name: _rounded(unit) for name, unit in _UNITS.items()} | {
    "q8_0": Bounds(0.01, 0.05, 0.9), "q6_k": Bounds(0.02, 0.1, 0.75),
    "q5_1": Bounds(0.05, 0.25, 0.5), "q5_0": Bounds(0.05, 0.25, 0.5),
    "q5_k_m": Bounds(0.05, 0.25, 0.5), "q5_k_s": Bounds(0.05, 0.25, 0.5),
    "q4_1": Bounds(0.15, 0.75, 0.25), "q4_0": Bounds(0.15, 0.75, 0.25),
    "q4_k_m": Bounds(0.15, 0.75, 0.25), "q4_k_s": Bounds(0.15, 0.75, 0.25), "q3_k_m": Bounds(0.4, 2.0, 0.25),
}  # fmt: skip
WEIGHT_ERRORS: dict[str, float] = {name: unit**2 for name, unit in _UNITS.items()} | {
    "q8_0": 2e-4, "q6_k": 1e-3, "q5_1": 4e-3, "q5_0": 6e-3, "q5_k": 4e-3, "q4_1": 2e-2, "q4_0": 2e-2, "q4_k": 2e-2,
    "q3_k": 8e-2,
}  # fmt: skip
"""Type of a stored weight -> normalised mean square error that it may have."""


@dataclass(frozen=True, slots=True)
class Probe:
    """Rows that every form of a model reads, and what the reference says about them.

    Attributes:
        rows: int64 [T_i], prompt and answer; `starts` is how many tokens of each are prompt.
        logits: float32 [sum of answer lengths, V] of the reference.
        effect: normalised mean square error of the base's logits against these; None without an adapter.
    """

    prompts: tuple[tuple[Message, ...], ...]
    rows: tuple[torch.Tensor, ...]
    starts: tuple[int, ...]
    logits: torch.Tensor
    effect: float | None

    def shortened(self, num_tokens: int) -> Probe:
        """The same with so many tokens of each answer, for forms that are asked one token at a time."""
        rows, kept, place = [], [], 0
        for row, start in zip(self.rows, self.starts, strict=True):
            rows.append(row[: start + num_tokens])
            kept.append(self.logits[place : place + min(num_tokens, len(row) - start)])
            place += len(row) - start
        return replace(self, rows=tuple(rows), logits=torch.cat(kept))


def load_with_adapter(base: Path, adapter: Path | None) -> LanguageModel:
    """The reference: a base in float32 with the adapter beside it, never merged.

    Raises:
        ModelError: the adapter does not fit, or it changes the head of a model that the native decoder does not run.
    """
    model = load_language_model(base, dtype=torch.float32)
    if adapter is None:
        return model.eval()
    tensors, linears = read_adapter_tensors(adapter), model.linears()
    if HEAD_LAYER not in linears and any(name.startswith(f"{PREFIX}{HEAD_LAYER}.") for name in tensors):
        hint = "Only the Llama family is certified with an adapted head."
        raise ModelError("it adapts the head of a model that transformers runs", where=str(adapter), hint=hint)
    # Nothing is dropped outside training, so layers that could not drop in it can carry the adapter all the same.
    lora = replace(read_adapter_config(adapter), lora_dropout=0.0)
    adapt(linears, lora, seed=0, counter=DropoutCounter(), every_target=False)
    load_adapter_tensors(linears, tensors, where=str(adapter))
    return model.eval()


def prompts_that_fit(
    renderer: Renderer, prompts: Sequence[Sequence[Message]], context: int, *, called: str = "context"
) -> tuple[tuple[Message, ...], ...]:
    """Those that leave room for an answer.

    Raises:
        ModelError: none does. TemplateError: a prompt cannot be rendered.
    """
    lengths = [len(renderer.prompt(prompt)) for prompt in prompts]
    kept = tuple(tuple(prompt) for prompt, n in zip(prompts, lengths, strict=True) if n + LEAST_ANSWER <= context)
    if not kept:
        what = f"none of {len(prompts)} prompts fits its {called} of {context}: the shortest has {min(lengths)} tokens"
        raise ModelError(what, hint="Export the run, whose own questions (evaluation.file) fit, or shorten those.")
    return kept


def make_probe(
    merge: Merge, renderer: Renderer, prompts: Sequence[Sequence[Message]], *, context: int | None = None
) -> Probe:
    """Let the reference answer the prompts, and keep its logits.

    Args:
        context: tokens of a prompt and its answer together at most; answers are shorter where it is short.

    Raises:
        EngineError: a prompt and its answer do not fit the model's context. TemplateError: a prompt cannot be rendered.
    """
    model = load_with_adapter(merge.base, merge.adapter)
    starts = [renderer.prompt(prompt) for prompt in prompts]
    longest = max(len(start) for start in starts)
    room = ANSWER_TOKENS if context is None else min(ANSWER_TOKENS, context - longest)
    params = SamplingParams(max_tokens=room)
    answers = collect(stream_tokens(model, starts, params, torch.device("cpu")), len(starts), params)
    rows = tuple(
        torch.from_numpy(np.concatenate([start, answer.tokens]).astype(np.int64))
        for start, answer in zip(starts, answers, strict=True)
    )
    lengths = tuple(len(start) for start in starts)
    logits = answer_logits(model, rows, lengths)
    del model
    effect = None
    if merge.adapter is not None:
        effect = normalised_error(answer_logits(load_with_adapter(merge.base, None), rows, lengths), logits)
    return Probe(tuple(tuple(prompt) for prompt in prompts), rows, lengths, logits, effect)


@torch.no_grad()
def answer_logits(model: LanguageModel, rows: Sequence[torch.Tensor], starts: Sequence[int]) -> torch.Tensor:
    """Float32 [sum of answer lengths, V]: what the model says at each place where the answer's next token is chosen."""
    pieces = []
    for row, start in zip(rows, starts, strict=True):
        hidden = model.hidden([row])[start - 1 : -1]
        pieces.append(model.logits(hidden).float())
    return torch.cat(pieces)


def normalised_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean square error over the spread of the reference's logits; a constant added to a row says nothing."""
    found, wanted = (x.double() - x.double().mean(dim=1, keepdim=True) for x in (found, wanted))
    return float((found - wanted).square().mean() / wanted.square().mean())


def divergence(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Mean KL(reference ‖ found) in nats for each predicted token."""
    p, q = torch.log_softmax(wanted.double(), dim=1), torch.log_softmax(found.double(), dim=1)
    return float((p.exp() * (p - q)).sum(dim=1).mean())


def compare_logits(probe: Probe, found: torch.Tensor, *, stage: str, precision: str) -> list[Check]:
    """Logits, distributions and chosen tokens of another form against the reference's, and the adapter's effect."""
    bounds, wanted = BOUNDS[precision], probe.logits
    if found.shape != wanted.shape or not bool(torch.isfinite(found).all()):
        what = f"{tuple(found.shape)} instead of {tuple(wanted.shape)}" if found.shape != wanted.shape else "not finite"
        return [Check(f"{stage}: logits", False, what, "the same shape, finite", "no comparison is possible")]
    error, kl = normalised_error(found, wanted), divergence(found, wanted)
    where = f"{len(wanted)} tokens of {len(probe.rows)} answers, vocabulary of {wanted.shape[1]:,}"
    checks = [
        Check(
            f"{stage}: logits", error <= bounds.logits, error, f"NMSE at most {bounds.logits:.3g} in {precision}", where
        ),
        Check(f"{stage}: distribution", kl <= bounds.kl, kl, f"KL at most {bounds.kl:.3g} nats in {precision}", where),
        _agreement(probe, found, stage=stage, least=bounds.agreement, error=error),
    ]
    if probe.effect is not None:
        ratio = probe.effect / max(error, 1e-12)
        evidence = f"the base alone is off by {probe.effect:.3g}, the export by {error:.3g}"
        bound = f"at least {LEAST_EFFECT:g} times the export's own error"
        checks.append(Check(f"{stage}: adapter's effect", ratio >= LEAST_EFFECT, ratio, bound, evidence))
    return checks


def _agreement(probe: Probe, found: torch.Tensor, *, stage: str, least: float, error: float) -> Check:
    """Greedy choices along the reference's answers; two tokens nearer than the export's noise may change places."""
    wanted, own = probe.logits, found.argmax(dim=1)
    best = wanted.argmax(dim=1)
    margin = (wanted.gather(1, best[:, None]) - wanted.gather(1, own[:, None]))[:, 0]
    noise = 4 * error**0.5 * float((wanted - wanted.mean(dim=1, keepdim=True)).square().mean().sqrt())
    other, differs = own != best, (own != best) & (margin > noise)
    shares, place, first = [], 0, ""
    for number, (row, start) in enumerate(zip(probe.rows, probe.starts, strict=True)):
        part = differs[place : place + len(row) - start]
        upto = int(part.nonzero()[0]) if bool(part.any()) else len(part)
        if upto < len(part) and not first:
            at = place + upto
            first = f"; prompt {number}, token {upto}: {int(own[at])} instead of {int(best[at])}"
        shares.append(upto / max(len(part), 1))
        place += len(part)
    lowest = min(shares)
    evidence = f"{int(other.sum())} of {len(own)} choices differ, {int(differs.sum())} of them no near tie{first}"
    longest = max(len(row) - start for row, start in zip(probe.rows, probe.starts, strict=True))
    bound = f"at least {least:.0%} of the {longest} tokens of every answer"
    return Check(f"{stage}: greedy answers", lowest >= least, lowest, bound, evidence)


def compare_weights(merge: Merge, folder: Path, *, stage: str, precision: str, types: Mapping[str, str]) -> Check:
    """Every weight of a folder against the merged one in float32; the worst and the first that differs are named.

    Args:
        types: of each stored weight, a key of `WEIGHT_ERRORS`; `precision` where it is not named.
    """
    wanted, worst, worst_name, first, seen = merge.shapes, 0.0, "", "", set()
    for name, tensor in read_tensors(folder):
        seen.add(name)
        if name not in wanted:
            if name != "lm_head.weight":  # a tied head, spelled out
                first = first or f"{name} is not in the merged model"
            continue
        exact, bound = merge.weight(name), WEIGHT_ERRORS[types.get(name, precision)]
        if tensor.shape != exact.shape:
            first = first or f"{name} has shape {tuple(tensor.shape)} instead of {tuple(exact.shape)}"
            continue
        scale = float(exact.double().square().mean()) or 1.0
        error = float((tensor.double() - exact.double()).square().mean()) / scale
        if not error <= bound and not first:
            first = f"{name} is off by {error:.3g}, more than {bound:.3g}"
        if not error <= worst:
            worst, worst_name = error, name
    lost = [name for name in wanted if name not in seen and not name.endswith("rotary_emb.inv_freq")]
    first = first or (f"{lost[0]} is missing" if lost else "")
    allowed = sorted({types.get(name, precision) for name in seen} or {precision})
    bound = "NMSE of each at most " + ", ".join(f"{WEIGHT_ERRORS[each]:.3g} in {each}" for each in allowed)
    evidence = first or f"{len(seen)} weights; the worst is {worst_name or 'none, all are equal'}"
    return Check(f"{stage}: weights", not first, worst, bound, evidence)


_NO_PART_OF_THE_FUNCTION = {
    "architecture", "bos_token_id", "eos_token_ids", "pad_token_id", "initializer_range", "attention_dropout",
    "dropout", "max_window_layers", "layer_types", "sliding_window", "max_position_embeddings", "experts",
    "tie_word_embeddings",
}  # fmt: skip


def compare_configs(merge: Merge, folder: Path, *, stage: str) -> Check:
    """Every number of the configuration that decides what is computed; the first that differs is named."""
    wanted, found = ModelConfig.from_hf(merge.config), ModelConfig.from_hf(read_config(folder))
    differing = []
    for item in fields(ModelConfig):
        mine, theirs = getattr(wanted, item.name), getattr(found, item.name)
        if item.name in _NO_PART_OF_THE_FUNCTION or mine == theirs:
            continue
        if isinstance(mine, float) and isinstance(theirs, float) and abs(mine - theirs) <= 1e-6 * abs(mine):
            continue  # the file keeps float32
        differing.append(f"{item.name} is {theirs} instead of {mine}")
    evidence = differing[0] if differing else "rope, norms, heads and sizes are the same"
    return Check(f"{stage}: configuration", not differing, len(differing), "no number differs", evidence)


def compare_tokens(
    renderer: Renderer,
    tokenizer: Tokenizer | None,
    template: str | None,
    stop_token_ids: Sequence[int],
    prompts: Sequence[Sequence[Message]],
    *,
    stage: str,
) -> list[Check]:
    """Token ids of rendered conversations, the template's bytes, and that every stop token stops.

    Args:
        tokenizer, template, stop_token_ids: what the exported files hold; without a tokenizer ids are left out.
    """
    wanted_template = renderer.template_text
    same = (template or "") == wanted_template
    evidence = "byte for byte"
    if not same:
        place = next(
            (i for i, (a, b) in enumerate(zip(wanted_template, template or "", strict=False)) if a != b),
            min(len(wanted_template), len(template or "")),
        )
        found = (template or "")[place : place + 20]
        evidence = f"differs from character {place}: {found!r} instead of {wanted_template[place : place + 20]!r}"
    missing = [stop for stop in renderer.stop_token_ids[:3] if stop not in stop_token_ids]
    texts = [renderer.tokenizer.decode([stop]) for stop in missing]
    evidence_stops = f"{', '.join(map(repr, texts))} would not stop" if missing else f"stops at {list(stop_token_ids)}"
    ids = []
    if tokenizer is not None:
        written = [renderer.text(prompt, add_generation_prompt=True) for prompt in prompts]
        mine, theirs = ([each.scan(text)[0] for text in written] for each in (renderer.tokenizer, tokenizer))
        ids = [compare_ids(mine, theirs, stage=stage)]
    return [
        Check(f"{stage}: chat template", same, "same" if same else "differs", "the renderer's bytes", evidence),
        *ids,
        Check(f"{stage}: stop tokens", not missing, len(missing), "every stop token stops", evidence_stops),
    ]


def compare_ids(wanted: Sequence[Sequence[int]], found: Sequence[Sequence[int]], *, stage: str) -> Check:
    """Token ids of the same texts, one list a text; the first that differs is named."""
    differing, evidence = 0, f"{len(wanted)} texts, token for token"
    for number, (mine, theirs) in enumerate(zip(wanted, found, strict=True)):
        if mine == theirs:
            continue
        pairs = enumerate(zip(mine, theirs, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), min(len(mine), len(theirs)))
        if not differing:
            evidence = f"text {number}, token {at}: {theirs[at : at + 3]} instead of {mine[at : at + 3]}"
        differing += 1
    return Check(f"{stage}: token ids", not differing, differing, "no text differs", evidence)
