"""A SentencePiece model as objects of the `tokenizers` package.

Two of them: one that finds pieces in text already normalised, and one for tokenizer.json that takes text as it is.
Knows how the package's models choose pieces, and where they choose otherwise than SentencePiece.
"""

from __future__ import annotations

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from model_foundry.errors import ModelError
from model_foundry.tokenizer.plain import RESERVED
from model_foundry.tokenizer.sentencepiece_file import Piece, PieceType, SentencePieceModel

SPACE = "▁"


def pieces_backend(model: SentencePieceModel, hidden: frozenset[str]) -> tokenizers.Tokenizer:
    """Finds the pieces of normalised text. Only normal and user-defined pieces can come out, and the unknown one.

    Args:
        model: the model.
        hidden: user-defined symbols that are not to be found.
    """
    symbols = set(model.of_type(PieceType.USER_DEFINED)) - hidden
    names = [
        piece.text if piece.type == PieceType.NORMAL or piece.text in symbols else f"{RESERVED}{index}"
        for index, piece in enumerate(model.pieces)
    ]
    if model.kind == "unigram":
        return tokenizers.Tokenizer(_unigram(model, names, [_score(piece) for piece in model.pieces]))
    backend = tokenizers.Tokenizer(_bpe(model, names))
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in sorted(symbols)])
    return backend


def text_backend(
    model: SentencePieceModel, *, adds_bos: bool = False, adds_eos: bool = False, space_everywhere: bool = False
) -> tokenizers.Tokenizer:
    """The nearest that tokenizer.json can say to the model.

    It differs from SentencePiece on text with characters for which several rules of normalisation hold, on
    user-defined symbols at the beginning of a text, and, unless `space_everywhere`, on text that begins with a space.

    Raises:
        ModelError: the `tokenizers` package does not take the model's rules.
    """
    names = [piece.text for piece in model.pieces]
    if model.kind == "unigram":
        inner = _unigram(model, names, [piece.score for piece in model.pieces], byte_fallback=model.byte_fallback)
    else:
        inner = _bpe(model, names, byte_fallback=model.byte_fallback)
    backend = tokenizers.Tokenizer(inner)
    backend.normalizer = normalizers.Sequence(_normalizers(model, space_everywhere))
    if model.add_dummy_prefix and not space_everywhere:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(_decoders(model))
    special = sorted((model.of_type(PieceType.CONTROL) | model.of_type(PieceType.UNKNOWN)).items(), key=_by_id)
    symbols = sorted(model.of_type(PieceType.USER_DEFINED).items(), key=_by_id)
    backend.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text, _ in special])
    backend.add_tokens([tokenizers.AddedToken(text, normalized=False) for text, _ in symbols])
    _add_frame(
        backend, model.named.get("bos_token") if adds_bos else None, model.named.get("eos_token") if adds_eos else None
    )
    return backend


def _add_frame(backend: tokenizers.Tokenizer, before: str | None, after: str | None) -> None:
    used = [text for text in (before, after) if text is not None]
    single = [*([before] if before else []), "$A", *([after] if after else [])]
    pair = [*single, *("$B:1" if part == "$A" else f"{part}:1" for part in single)]
    if used:
        ids = [(text, backend.token_to_id(text)) for text in dict.fromkeys(used)]
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _unigram(
    model: SentencePieceModel, names: list[str], scores: list[float], *, byte_fallback: bool = False
) -> models.Unigram:
    vocab = list(zip(names, scores, strict=True))
    return models.Unigram(vocab, unk_id=model.unknown_id, byte_fallback=byte_fallback)


def _bpe(model: SentencePieceModel, names: list[str], *, byte_fallback: bool = False) -> models.BPE:
    vocab = {name: index for index, name in enumerate(names)}
    unknown = names[model.unknown_id]
    return models.BPE(
        vocab=vocab, merges=merges_of(model), unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback
    )


def _score(piece: Piece) -> float:
    """Its own, or the one that lets a user-defined symbol always win (`unigram_model.cc` of SentencePiece 0.2.3).

    Before that version a long symbol could lose against its parts.
    """
    if piece.type != PieceType.USER_DEFINED:
        return piece.score
    return float(np.float32(0.1 * (len(piece.text.encode()) - 1)))


def merges_of(model: SentencePieceModel) -> list[tuple[str, str]]:
    """The merges of a BPE model, the first to be made first.

    SentencePiece joins whatever gives the best-scored piece, however it is divided, leftmost first; `tokenizers` wants
    the pairs in a fixed order. Two divisions of one piece can only compete where they overlap, and then at i and n - i
    characters: the one whose right half can be the other's left half stands on the left, so it comes first.
    """
    normal = {piece.text: piece.score for piece in model.pieces if piece.type == PieceType.NORMAL}
    ids = {piece.text: index for index, piece in enumerate(model.pieces)}
    merges: list[tuple[str, str]] = []
    for text in sorted(normal, key=lambda text: (-normal[text], ids[text])):
        length = len(text)
        divisions = [at for at in range(1, length) if text[:at] in normal and text[at:] in normal]
        divisions.sort(key=lambda at: (min(at, length - at), text[at:] != text[: length - at]))
        merges += [(text[:at], text[at:]) for at in divisions]
    return merges


def _normalizers(model: SentencePieceModel, space_everywhere: bool) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = []
    if model.charsmap:
        try:
            steps.append(normalizers.Precompiled(model.charsmap))
        except Exception as error:  # the package raises bare Exception
            raise ModelError("the normalisation rules of the SentencePiece model are damaged") from error
    if model.remove_extra_whitespaces:
        steps += [
            normalizers.Replace(tokenizers.Regex(r"\A +| +\z"), ""),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    if model.add_dummy_prefix and space_everywhere:
        steps.append(normalizers.Prepend(SPACE))
    return [*steps, normalizers.Replace(" ", SPACE)]


def _decoders(model: SentencePieceModel) -> list[decoders.Decoder]:
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.add_dummy_prefix or model.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", 1, 0))
    return steps


def _by_id(item: tuple[str, int]) -> int:
    return item[1]
