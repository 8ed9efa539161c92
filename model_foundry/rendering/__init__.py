"""From messages to tokens and loss weights: one renderer for training, sampling and serving."""

from model_foundry.rendering.renderer import Rendered, Renderer

__all__ = ["Rendered", "Renderer"]
