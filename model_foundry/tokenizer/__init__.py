"""Text to token ids and back: one interface over Hugging Face's fast tokenizers and SentencePiece models."""

from model_foundry.tokenizer.core import Tokenizer
from model_foundry.tokenizer.padding import Batch
from model_foundry.tokenizer.plain import RESERVED, PlainEncoder, TextEncoder

__all__ = ["Tokenizer", "Batch", "PlainEncoder", "TextEncoder", "RESERVED"]
