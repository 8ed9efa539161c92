"""Prompts for a model without a chat template, one that was only pretrained: the texts themselves.

Such a model has no turns to write. It is measured on what it does: going on with a text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model_foundry.rendering import Renderer
from model_foundry.rendering.renderer import Tools
from model_foundry.types import Message


class PlainPrompts(Renderer):
    """The renderer of a tokenizer without a template: messages one after the other, begun as the tokenizer begins."""

    def text(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False, tools: Tools | None = None
    ) -> str:
        begin = self.tokenizer.named["bos_token"] if self.tokenizer.adds_bos else ""
        return begin + "\n\n".join(message.content for message in messages)

    def prompt(self, messages: Sequence[Message], *, tools: Tools | None = None) -> np.ndarray:
        """int32 [T]: the text, to be gone on with."""
        return np.array(self.tokenizer.scan(self.text(messages))[0], dtype=np.int32)
