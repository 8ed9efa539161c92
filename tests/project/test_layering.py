"""Imports run one way. Read from the source, so an import inside a function counts as well.

Each test names the rot it prevents: a room that reaches upwards, a pure module that drags torch in, a command line that
needs seconds to print its help.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "model_foundry"

# Lower numbers know nothing of higher ones; rooms on one line may use each other as long as no circle appears.
LAYERS = {
    "types": 0, "errors": 0,
    "config": 1, "tokenizer": 1, "rendering": 1, "checkpoint": 1, "data": 1, "generate": 1,
    "models": 2,
    "engine": 3,
    "run": 4,
    "evals": 5, "export": 5, "service": 5,
    "client": 6,
    "recipes": 7, "server": 7,
    "cli": 8,
}  # fmt: skip
NEVER_EACH_OTHER = {"recipes", "server", "service"}
TORCH_FREE = {"types", "errors", "config", "tokenizer", "rendering", "checkpoint", "data", "generate"}
TORCH_LIBRARIES = {"torch", "transformers", "peft", "trl", "accelerate", "datasets"}
HEAVY = TORCH_LIBRARIES | {"mlflow", "wandb", "tensorboard", "gguf", "matplotlib", "pandas"}
MAY_SEE_CONFIG_OBJECTS = {"config", "recipes", "server", "service", "cli"}
HTTP_LIBRARIES = {
    "httpx", "requests", "urllib3", "aiohttp", "huggingface_hub", "fastapi", "starlette", "uvicorn",
    "urllib.request", "http.client", "http.server",
}  # fmt: skip
MAY_SPEAK_HTTP = (
    "server/",
    "service/",
    "client/remote.py",
    "generate/",
    "models/fetch",
    "data/hub",
    "export/ollama",
    "export/llama_cpp",  # asked over a socket of its own
    "evals/served_target",
)
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "managers", "misc"}


@dataclass(frozen=True)
class Import:
    """One imported module: where it is written, and whether importing the file runs it."""

    name: str
    line: int
    at_import_time: bool


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def absolute(node: ast.ImportFrom, path: Path) -> str:
    """The module a `from` import reads, with leading dots resolved."""
    if node.level == 0:
        return node.module or ""
    package = path.relative_to(ROOT).parts[: -node.level]
    return ".".join(package) + (f".{node.module}" if node.module else "")


def walk_imports(body: list[ast.stmt], path: Path, at_import_time: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import_time)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, path)
            yield Import(base, node.lineno, at_import_time)
            for alias in node.names:
                yield Import(f"{base}.{alias.name}", node.lineno, at_import_time)
        else:
            runs_now = at_import_time and not is_type_checking(node)
            runs_now = runs_now and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for _, value in ast.iter_fields(node):
                children = value if isinstance(value, list) else [value]
                for child in children:
                    if isinstance(child, ast.ExceptHandler | ast.match_case):
                        yield from walk_imports(child.body, path, runs_now)
                yield from walk_imports([child for child in children if isinstance(child, ast.stmt)], path, runs_now)


@cache
def imports_of(path: Path) -> tuple[Import, ...]:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return tuple(walk_imports(tree.body, path, True))


def our_rooms(path: Path) -> Iterator[tuple[str, Import]]:
    for item in imports_of(path):
        parts = item.name.split(".")
        if parts[0] == "model_foundry" and len(parts) > 1 and parts[1] in LAYERS:
            yield parts[1], item


def place(path: Path, item: Import) -> str:
    return f"{path.relative_to(ROOT)}:{item.line} imports {item.name}"


def test_every_room_has_a_layer() -> None:
    """A new room that no layer knows would be free to import anything."""
    unknown = {room_of(path) for path in source_files()} - set(LAYERS) - {"__init__", "__main__"}
    assert not unknown, f"give these a line in LAYERS and in docs/architecture.md: {sorted(unknown)}"


def test_imports_run_one_way() -> None:
    wrong = [
        place(path, item)
        for path in source_files()
        if room_of(path) in LAYERS
        for room, item in our_rooms(path)
        if LAYERS[room] > LAYERS[room_of(path)]
    ]
    assert not wrong, "\n".join(wrong)


def test_recipes_server_and_service_never_meet() -> None:
    wrong = [
        place(path, item)
        for path in source_files()
        for room, item in our_rooms(path)
        if room != room_of(path) and {room, room_of(path)} <= NEVER_EACH_OTHER
    ]
    assert not wrong, "\n".join(wrong)


def test_rooms_form_no_circle() -> None:
    """Two rooms of one layer may use each other in one direction only, or neither can be read alone."""
    edges: dict[str, set[str]] = {}
    for path in source_files():
        edges.setdefault(room_of(path), set()).update(room for room, _ in our_rooms(path) if room != room_of(path))

    def visit(room: str, trail: tuple[str, ...]) -> None:
        assert room not in trail, "circle: " + " -> ".join([*trail[trail.index(room) :], room])
        for target in sorted(edges.get(room, ())):
            visit(target, (*trail, room))

    for room in sorted(edges):
        visit(room, ())


def test_pure_rooms_never_import_torch() -> None:
    wrong = [
        place(path, item)
        for path in source_files()
        if room_of(path) in TORCH_FREE
        for item in imports_of(path)
        if item.name.split(".")[0] in TORCH_LIBRARIES
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_below_recipes_takes_a_config_object() -> None:
    wrong = [
        place(path, item)
        for path in source_files()
        if room_of(path) in LAYERS and room_of(path) not in MAY_SEE_CONFIG_OBJECTS
        for item in imports_of(path)
        if item.name.split(".")[0] == "pydantic" or item.name.startswith("model_foundry.config.schema")
    ]
    assert not wrong, "\n".join(wrong)


def test_http_stays_at_the_edges() -> None:
    def speaks_http(name: str) -> bool:
        return any(name == library or name.startswith(library + ".") for library in HTTP_LIBRARIES)

    wrong = [
        place(path, item)
        for path in source_files()
        if not str(path.relative_to(PACKAGE)).startswith(MAY_SPEAK_HTTP)
        for item in imports_of(path)
        if speaks_http(item.name)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_has_an_empty_name() -> None:
    """`utils` says nothing about what is inside, so everything ends up there."""
    wrong = [str(path) for path in source_files() if EMPTY_NAMES & set(path.relative_to(ROOT).with_suffix("").parts)]
    assert not wrong, wrong


def test_no_remote_code_and_no_pickle() -> None:
    """A model folder or a checkpoint is data. Loading one must never run it."""
    wrong = []
    for path in source_files():
        text = path.read_text(encoding="utf-8")
        wrong += [f"{path}: trust_remote_code"] if "trust_remote_code=True" in text else []
        wrong += [place(path, item) for item in imports_of(path) if item.name.split(".")[0] in {"pickle", "dill"}]
        wrong += [f"{path}: torch.load reads pickles"] if "torch.load(" in text else []
    assert not wrong, "\n".join(wrong)


def test_third_party_imports_are_declared() -> None:
    """An undeclared import works on the author's machine and nowhere else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = project["dependencies"] + [line for extra in set(extras) - {"dev"} for line in extras[extra]]
    names = {line.replace(">", "[").replace("=", "[").split("[")[0].strip().lower() for line in wanted}
    names |= {name.replace("-", "_") for name in names}
    # Imported names that differ from their distribution's.
    aliases = {
        "yaml": "pyyaml", "mlflow": "mlflow-skinny", "pydantic_core": "pydantic", "google": "protobuf",
    }  # fmt: skip
    declared = names | {module for module, distribution in aliases.items() if distribution in names}
    wrong = [
        place(path, item)
        for path in source_files()
        for item in imports_of(path)
        if (root := item.name.split(".")[0]) not in sys.stdlib_module_names and root not in declared | {"model_foundry"}
    ]
    assert not wrong, "\n".join(wrong)


def reached_at_import(path: Path, seen: dict[Path, str], trail: str) -> Iterator[str]:
    """Walks what importing `path` would import, through our own modules, and yields every heavy library met."""
    if path in seen:
        return
    seen[path] = trail
    for item in imports_of(path):
        if not item.at_import_time:
            continue
        if item.name.split(".")[0] in HEAVY:
            yield f"{trail} -> {item.name}"
        target = ROOT.joinpath(*item.name.split("."))
        for candidate in (target.with_suffix(".py"), target / "__init__.py"):
            if item.name.startswith("model_foundry") and candidate.is_file():
                yield from reached_at_import(candidate, seen, f"{trail} -> {item.name}")


def test_importing_a_command_imports_nothing_heavy() -> None:
    """A usage error or a bad configuration must not wait seconds for torch first."""
    entries = [*sorted((PACKAGE / "cli").glob("*.py")), PACKAGE / "__init__.py"]
    wrong = [found for path in entries for found in reached_at_import(path, {}, module_name(path))]
    assert not wrong, "\n".join(wrong)
