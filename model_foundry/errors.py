"""The one error tree. Every error a user can cause says what is wrong, where, and what to do next.

FoundryError                      exit 3   anything we raise on purpose
├── UsageError                    exit 2   a command line that cannot be meant
├── ConfigError                   exit 2   unknown key, bad value, missing parent, inheritance cycle
├── DataError                     exit 2   rows that cannot be used, named by file, line and field
│   └── TemplateError             exit 2   a chat template that fails on a row
│       └── UnsafeTemplateError            a chat template that does something it must not
├── MissingExtraError             exit 2   an optional dependency is not installed
├── ModelError                    exit 2   a model that cannot be found, read, or does not fit
│   ├── ModelNotFoundError
│   └── ArchitectureMismatchError          weights or adapter made for another model
├── RunError                      exit 2   a run directory that belongs to something else
├── CheckpointError               exit 3   a checkpoint that is absent or incomplete
│   └── CheckpointCorruptError             bytes differ from the manifest
├── EngineError                   exit 3   a step that could not be done; state is as it was before
│   └── OutOfMemoryError                   even the smallest piece does not fit
├── ServiceError                  exit 3   a training service refused a request
│   ├── RequestFailedError                 an operation that it accepted failed; `category` says whose fault it is
│   └── ServiceUnreachableError            nobody answers
├── InterruptedRunError           exit 3   stopped by a signal after saving
└── CheckFailedError              exit 1   a criterion or a proof did not hold
"""

from __future__ import annotations


class FoundryError(Exception):
    """An error with a place and a next step.

    Args:
        what: what is wrong, one sentence without a full stop.
        where: file, line, key or module it concerns.
        hint: the next command or edit that helps.
    """

    exit_code = 3

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = self.what if self.where is None else f"{self.where}: {self.what}"
        return text if self.hint is None else f"{text}. {self.hint}"


class UsageError(FoundryError):
    exit_code = 2


class ConfigError(FoundryError):
    exit_code = 2


class DataError(FoundryError):
    exit_code = 2


class TemplateError(DataError):
    pass


class UnsafeTemplateError(TemplateError):
    pass


class MissingExtraError(FoundryError):
    """An optional dependency is missing; the message names the extra that brings it."""

    exit_code = 2

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"the package '{package}' is not installed",
            hint=f"Install it with: pip install 'model-foundry[{extra}]'",
        )


class ModelError(FoundryError):
    exit_code = 2


class ModelNotFoundError(ModelError):
    pass


class ArchitectureMismatchError(ModelError):
    pass


class RunError(FoundryError):
    exit_code = 2


class CheckpointError(FoundryError):
    pass


class CheckpointCorruptError(CheckpointError):
    pass


class EngineError(FoundryError):
    pass


class OutOfMemoryError(EngineError):
    pass


class BrokenModelError(EngineError):
    """What it computes are no numbers."""


class ServiceError(FoundryError):
    """A refusal; `status` is HTTP's, None where there was none."""

    def __init__(
        self, what: str, *, where: str | None = None, hint: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.status = status


class RequestFailedError(ServiceError):
    """An operation failed, and left its model as it was. `category` is user, server or unknown."""

    def __init__(self, what: str, *, where: str | None = None, category: str = "unknown") -> None:
        super().__init__(what, where=where)
        self.category = category


class ServiceUnreachableError(ServiceError):
    pass


class InterruptedRunError(FoundryError):
    pass


class CheckFailedError(FoundryError):
    exit_code = 1
