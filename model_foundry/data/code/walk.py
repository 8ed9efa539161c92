"""The source files below some folders, in an order that never changes, and the text of each.

Survives what real trees hold: cyclic links, pipes, files that vanish or may not be read, binary and compiled files,
other encodings. Whatever is passed over is counted with a reason. Knows languages by their file endings alone.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from model_foundry.data.code.units import Skipped
from model_foundry.errors import DataError

MAX_FILE_BYTES = 1_000_000
LONG_LINE_CHARS = 500
GENERATED_HEAD_LINES = 20

COMPILED = {
    b"\x1bLua": "compiled Lua",
    b"\x1bLJ": "compiled LuaJIT",
    b"GDSC": "compiled GDScript",
    b"GDEC": "encrypted GDScript",
}
"""First bytes -> what the file really is."""

_GENERATED = re.compile(
    r"\W*(?:@generated\b|auto(?:matically)?[- ]?generated\b|generated (?:automatically|by|from|code|file)\b"
    r"|(?:this|the) (?:file|code|script|module) (?:is|was|has been) (?:\w+[- ])?generated\b|this is a generated file"
    r"|file \S+ generated (?:by|from)\b|.*\bdo not edit\b|.*\bdo not modify (?:this file|by hand)\b)",
    re.IGNORECASE,
)
"""A comment whose beginning says that a program wrote the file."""
_CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b")) + b"\x7f"


@dataclass(frozen=True, slots=True)
class FileRules:
    """Which files are read.

    Attributes:
        suffixes: endings of the language's files.
        include, exclude: globs over the path below the root; see `glob_pattern`.
        comment_marks: what starts a comment, to tell a generated file by its head.
    """

    suffixes: tuple[str, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    max_file_bytes: int = MAX_FILE_BYTES
    skip_generated: bool = True
    comment_marks: tuple[str, ...] = ("--", "#", "//", "/*")


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read: where it is, its path below the root (printable, forward slashes), its size in bytes."""

    path: Path
    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class SourceText:
    """A decoded file. `text` keeps every line ending; a byte order mark is no part of it."""

    text: str
    encoding: str


def glob_pattern(glob: str) -> re.Pattern[str]:
    """A glob as a pattern over whole relative paths.

    `*` and `?` stay within a folder, `**` crosses folders. A glob without a slash means the name at any depth; one that
    matches a folder means everything below it.
    """
    glob = glob.removeprefix("./")
    anchored = "/" in glob.rstrip("/")
    text = glob.strip("/")
    out, index = "", 0
    while index < len(text):
        if text.startswith("**/", index):
            out, index = out + "(?:.*/)?", index + 3
        elif text.startswith("**", index):
            out, index = out + ".*", index + 2
        elif text[index] == "[" and (end := text.find("]", index + 2)) > 0:
            inner = text[index + 1 : end].replace("\\", "\\\\")
            out, index = out + ("[^" + inner[1:] if inner[0] in "!^" else "[" + inner) + "]", end + 1
        else:
            out += {"*": "[^/]*", "?": "[^/]"}.get(text[index]) or re.escape(text[index])
            index += 1
    head = "" if anchored else "(?:.*/)?"
    try:
        return re.compile(f"{head}{out}(?:/.*)?", re.DOTALL)
    except re.error as error:
        raise DataError(f"the glob {glob!r} cannot be read: {error}") from error


def list_files(roots: Sequence[Path], rules: FileRules, skipped: Skipped) -> Iterator[SourceFile]:
    """Every file of the language below `roots`: roots as given, then by name; each file once.

    With several roots, names begin with their root's.

    Raises:
        DataError: a root that is not there.
    """
    include = [glob_pattern(glob) for glob in rules.include]
    exclude = [(glob, glob_pattern(glob)) for glob in rules.exclude]
    seen: set[tuple[int, int]] = set()
    for root in roots:
        prefix = f"{root.resolve().name}/" if len(roots) > 1 else ""
        for path, relative in _walk(root, rules.suffixes, skipped, seen, prefix):
            name = prefix + relative
            if include and not any(pattern.fullmatch(relative) for pattern in include):
                skipped.add("not among include", name)
                continue
            glob = next((glob for glob, pattern in exclude if pattern.fullmatch(relative)), None)
            if glob is not None:
                skipped.add(f"excluded by {glob}", name)
                continue
            try:
                status = path.stat()
            except OSError as error:
                skipped.add(_unreadable(error), name)
                continue
            reason = _status_problem(status, rules, seen)
            if reason is not None:
                skipped.add(reason, name)
                continue
            yield SourceFile(path, name, status.st_size)


def _status_problem(status: os.stat_result, rules: FileRules, seen: set[tuple[int, int]]) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if (status.st_dev, status.st_ino) in seen:
        return "the same file under another name"
    seen.add((status.st_dev, status.st_ino))
    if status.st_size == 0:
        return "empty file"
    if status.st_size > rules.max_file_bytes:
        return f"over {rules.max_file_bytes:,} bytes"
    return None


def _walk(
    root: Path, suffixes: tuple[str, ...], skipped: Skipped, seen: set[tuple[int, int]], prefix: str
) -> Iterator[tuple[Path, str]]:
    """Paths with the wanted endings and their printable names below `root`. A stack, as trees may be deep."""
    try:
        is_folder = stat.S_ISDIR(root.stat().st_mode)
    except OSError as error:
        raise DataError("there is no such folder or file", where=str(root), hint="Check the path") from error
    if not is_folder:
        yield root, _printable(root.name)
        return
    stack: list[tuple[str, str]] = [(str(root), "")]
    while stack:
        location, below = stack.pop()
        try:
            status = Path(location).stat()
            if below and (status.st_dev, status.st_ino) in seen:
                skipped.add("a folder already read", prefix + _printable(below))
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(location) as found:
                entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            skipped.add(f"folder: {_unreadable(error)}", prefix + _printable(below))
            continue
        folders = []
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if _is_folder(entry):
                folders.append((entry.path, name))
            elif entry.name.lower().endswith(suffixes):
                yield Path(entry.path), _printable(name)
        stack += reversed(folders)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle of links: reading it as a file will say so
        return False


def _unreadable(error: OSError) -> str:
    return f"cannot be read: {error.strerror or type(error).__name__}"


def _printable(name: str) -> str:
    """A file name need not be text; what is none is written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def read_source(file: SourceFile, rules: FileRules) -> SourceText | str:
    """The file's text, or the reason why it has none worth reading."""
    try:
        with open(file.path, "rb") as handle:
            data = handle.read(rules.max_file_bytes + 1)
    except OSError as error:
        return _unreadable(error)
    if len(data) > rules.max_file_bytes:
        return f"over {rules.max_file_bytes:,} bytes"
    source = decode(data)
    if isinstance(source, str):
        return source
    if not source.text.strip():
        return "empty file"
    if rules.skip_generated and (reason := machine_made(source.text, rules.comment_marks)) is not None:
        return reason
    return source


def decode(data: bytes) -> SourceText | str:
    """Bytes as text by byte order mark, then UTF-8, then Windows-1252 and Latin-1; a reason when they are no text."""
    for magic, what in COMPILED.items():
        if data.startswith(magic):
            return what
    marks = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}
    for mark, encoding in marks.items():
        if data.startswith(mark):
            try:
                return SourceText(data[len(mark) :].decode(encoding), f"{encoding} with a byte order mark")
            except UnicodeDecodeError:
                return f"damaged {encoding}"
    if b"\0" in data or len(data) - len(data.translate(None, _CONTROL)) > len(data) // 100:
        return "binary file"
    for encoding in ("utf-8", "cp1252"):
        try:
            return SourceText(data.decode(encoding), encoding)
        except UnicodeDecodeError:
            continue
    return SourceText(data.decode("latin-1"), "latin-1")


def machine_made(text: str, comment_marks: Sequence[str]) -> str | None:
    """Why a file counts as made by a program, None when a person wrote it.

    Generated: one of its first 20 lines is a comment with a known notice. Minified: more than half of its characters
    stand in lines of over 500.
    """
    lines = text.splitlines()
    for line in lines[:GENERATED_HEAD_LINES]:
        if line.lstrip().startswith(tuple(comment_marks)) and _GENERATED.match(line[:LONG_LINE_CHARS]):
            return "generated file"
    num_long = sum(len(line) for line in lines if len(line) > LONG_LINE_CHARS)
    return "minified file" if num_long * 2 > len(text) else None
