"""Which extra brings which optional package. `pyproject.toml` declares the same; a test compares them."""

from __future__ import annotations

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("torch", "transformers", "gguf", "huggingface_hub", "filelock", "psutil", "numba", "llvmlite"),
    "data": ("pyarrow", "zstandard"),
    "code": ("tree_sitter", "tree_sitter_lua", "tree_sitter_gdscript"),
    "generate": ("anthropic", "httpx"),
    "gguf": ("gguf", "ollama", "xllamacpp"),
    "quant": ("bitsandbytes",),
    "mlx": ("mlx", "mlx_lm"),
    "serve": ("fastapi", "h11", "httpx", "prometheus_client", "starlette", "uvicorn"),
    "service": ("fastapi", "google.protobuf", "httpx", "sqlalchemy", "uvicorn", "zstandard"),
    "postgres": ("psycopg",),
    "track": ("tensorboard", "wandb", "mlflow"),
}
"""Extra -> the modules it makes importable."""


def extra_of(module: str | None) -> str | None:
    """The extra that brings a module, None when no extra does."""
    roots = {(module or "").partition(".")[0], ".".join((module or "").split(".")[:2])}
    return next((extra for extra, modules in EXTRAS.items() if roots & set(modules)), None)
