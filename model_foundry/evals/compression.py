"""How well a text can be foretold, in bits per byte: by a model, by the frequencies of tokens alone, by compressors.

A model's bits per byte are its loss over the text's size: what an arithmetic coder would need with it. gzip and xz get
the text alone and have learned nothing beforehand; a trained model has, and its own size is not counted. So beating
them says that something was learned, and not that a model is a better archive.
"""

from __future__ import annotations

import lzma
import math
import zlib

import numpy as np

from model_foundry.types import Check

_GZIP = 16 + zlib.MAX_WBITS


def bits_per_byte(loss: float, *, num_tokens: int, num_bytes: int) -> float:
    """From a mean loss in nats a token."""
    return loss * num_tokens / (num_bytes * math.log(2))


def unigram_bits_per_byte(counts: np.ndarray, tokens: np.ndarray, *, num_bytes: int) -> float:
    """What tokens cost when each is foretold by its frequency in the training text, one added to each count.

    Args:
        counts: int64 [V], of each token in the training text.
        tokens: int [T], the held-out text.
    """
    smoothed = counts.astype(np.float64) + 1.0
    bits = np.log2(smoothed.sum()) - np.log2(smoothed)
    return float(bits[tokens].sum() / num_bytes)


def gzip_bits_per_byte(text: bytes) -> float:
    """`gzip -9` on the text."""
    packer = zlib.compressobj(9, zlib.DEFLATED, _GZIP)
    return 8 * (len(packer.compress(text)) + len(packer.flush())) / len(text)


def xz_bits_per_byte(text: bytes) -> float:
    """`xz -9e` on the text."""
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def bits_check(found: float, *, bound: float) -> Check:
    return Check(
        name="bits_per_byte",
        passed=found <= bound,
        value=found,
        bound=f"at most {bound:g}",
        evidence=f"The held-out text costs {found:.4f} bits a byte.",
    )


def unigram_check(found: float, unigram: float, *, bound: float) -> Check:
    """A model must be the share `bound` below what the frequencies of tokens alone give."""
    return Check(
        name="below_unigram",
        passed=1 - found / unigram > bound,
        value=1 - found / unigram,
        bound=f"> {bound * 100:.3g} %",
        evidence=f"{found:.4f} bits a byte on the held-out text; the frequencies of tokens alone need {unigram:.4f}.",
    )
