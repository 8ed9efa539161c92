"""Train, fine-tune and ship language models, with proof at every hand-over.

The names below are the public ones. Each is imported when it is first used, so that importing the package, or asking
the command line for help, costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Read by torch's libraries when they are loaded, so set before. OpenMP threads that spin while they wait make a busy
# machine ten times slower; oneDNN's default of 1,024 kept kernels is half a gigabyte once rows of many lengths came by.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")

if TYPE_CHECKING:
    from model_foundry import errors as errors
    from model_foundry.client.local import TrainingClient as TrainingClient
    from model_foundry.client.service_client import ServiceClient as ServiceClient
    from model_foundry.config.load import Resolved as Resolved
    from model_foundry.config.load import load_config as load_config
    from model_foundry.config.schema import ChatConfig as ChatConfig
    from model_foundry.config.schema import EvaluateConfig as EvaluateConfig
    from model_foundry.config.schema import TrainConfig as TrainConfig
    from model_foundry.engine.base import Engine as Engine
    from model_foundry.engine.torch_engine import TorchEngine as TorchEngine
    from model_foundry.errors import FoundryError as FoundryError
    from model_foundry.rendering import Renderer as Renderer
    from model_foundry.tokenizer import Tokenizer as Tokenizer
    from model_foundry.types import AdamParams as AdamParams
    from model_foundry.types import Datum as Datum
    from model_foundry.types import LoraConfig as LoraConfig
    from model_foundry.types import Message as Message
    from model_foundry.types import SamplingParams as SamplingParams

_HOMES: dict[str, str] = {
    "errors": "model_foundry.errors",
    "FoundryError": "model_foundry.errors:FoundryError",
    "AdamParams": "model_foundry.types:AdamParams",
    "Datum": "model_foundry.types:Datum",
    "LoraConfig": "model_foundry.types:LoraConfig",
    "Message": "model_foundry.types:Message",
    "SamplingParams": "model_foundry.types:SamplingParams",
    "load_config": "model_foundry.config.load:load_config",
    "Resolved": "model_foundry.config.load:Resolved",
    "TrainConfig": "model_foundry.config.schema:TrainConfig",
    "EvaluateConfig": "model_foundry.config.schema:EvaluateConfig",
    "ChatConfig": "model_foundry.config.schema:ChatConfig",
    "Tokenizer": "model_foundry.tokenizer:Tokenizer",
    "Renderer": "model_foundry.rendering:Renderer",
    "Engine": "model_foundry.engine.base:Engine",
    "TorchEngine": "model_foundry.engine.torch_engine:TorchEngine",
    "TrainingClient": "model_foundry.client.local:TrainingClient",
    "ServiceClient": "model_foundry.client.service_client:ServiceClient",
}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'model_foundry' has no attribute '{name}'")
    module, _, attribute = _HOMES[name].partition(":")
    value = importlib.import_module(module)
    value = getattr(value, attribute) if attribute else value
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
