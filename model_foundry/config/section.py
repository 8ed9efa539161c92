"""What every schema is made of: the frozen section, the bounded numbers, and how a broken rule is worded."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class InputFile:
    """Marks a file that must exist and may be written relative to the YAML that names it."""


class InputRows(InputFile):
    """Marks rows, or code: a file or a folder of files."""


class HubName:
    """Marks the address of a data set on the Hugging Face hub, which is no path: a Path would lose a slash of it."""


InputPath = Annotated[Path, InputFile]
CodePath = Annotated[Path, InputRows]
RowsPath = Annotated[Path, InputRows] | Annotated[str, Field(pattern="^hf://datasets/"), HubName]
TemplateName = Annotated[str, InputFile]
EngineName = Literal["auto", "torch", "mlx"]


class Section(BaseModel):
    """A frozen part of a configuration; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    alternatives: ClassVar[tuple[str, ...]] = ()
    """Fields that say the same thing in other ways: a layer that gives one takes the place of the others below it."""

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise ValueError("true and false are not numbers")
        return value


def asked_for(section: Section, name: str) -> bool:
    """Whether somebody asked for what a field says.

    A section with every field in it was written out by us, as a run keeps it: its defaults were asked for by nobody.
    """
    fields, value = type(section).model_fields, getattr(section, name)
    is_own = value != fields[name].default or section.model_fields_set < set(fields)
    return name in section.model_fields_set and value is not None and is_own


def broken_rule(field: str, message: str) -> PydanticCustomError:
    """A rule between fields that does not hold; `field` (dotted from another section) is where the error points."""
    return PydanticCustomError("rule", "{message}", {"field": field, "message": message})
