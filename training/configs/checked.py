"""Self-validating dataclasses: constrained types, and errors that name the field, the value and what is accepted."""

import dataclasses
import functools
import os
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, TypeVar, cast, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from latte_flow.training.errors import UserError

LIMIT = 2**64
"""Exclusive upper limit of all numbers: random generators take 64 bits, and much larger integers do not convert to floats."""
ACCEPTED = {  # for error types whose pydantic message does not name an accepted value
    "dataclass_type": "a mapping of its fields",
    "invalid_key": "names that are text",
    "unexpected_keyword_argument": "the fields that --help lists, each inside its section",
}
PATTERN = re.compile(r"[*?\[\]\r\n]|::")
T = TypeVar("T")


def check_path(text: str | None) -> str | None:
    """Reject text that cannot be a path, and paths that a library or a shell would read as a pattern, a URL or an option.

    DeepSpeed globs the path of a checkpoint: resuming runs/lr[12] would load the weights of runs/lr1. datasets globs its files,
    and fsspec splits paths at ``::``.
    """
    try:
        encoded = (text or "").encode()
    except UnicodeEncodeError:  # libraries take no other paths
        encoded = b"\0"
    if b"\0" in encoded or len(encoded) >= 4096 or any(len(part) > 255 for part in encoded.split(b"/")):
        raise ValueError("a path in UTF-8")
    if text and (text.startswith("-") or PATTERN.search(os.path.abspath(text))):
        raise ValueError(
            "a path without * ? [ ] :: or line breaks, in the folders above it too, that does not start with -"
        )
    return text


def one_of(table: Mapping[str, object]) -> AfterValidator:
    """Accept the names in a table, also of entries that are added later."""

    def check(name: str) -> str:
        if name not in table:
            raise ValueError(", ".join(table))
        return name

    return AfterValidator(check)


# Strict: neither true nor "1" is accepted as 1.
PositiveInt = Annotated[int, Field(strict=True, gt=0, lt=LIMIT)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0, lt=LIMIT)]
Real = Annotated[float, Field(strict=True)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0, lt=LIMIT)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0, lt=LIMIT)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1)]
PathText = Annotated[str, AfterValidator(check_path)]
OptionalPath = Annotated[str | None, AfterValidator(check_path)]


class _Short(reprlib.Repr):
    def repr_int(self, x, level):
        # Python refuses to print integers of more than 4300 digits.
        return repr(x) if x.bit_length() <= 64 else f"an integer of {x.bit_length()} bits"


_short = _Short()
_short.maxlevel, _short.maxstring, _short.maxother = 2, 80, 80


def shown(value: object) -> str:
    """Return the repr of a value, shortened if long."""
    text = _short.repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


@dataclass_transform(field_specifiers=(dataclasses.field,))
def checked(kind: type[T]) -> type[T]:
    """Make a class a dataclass that raises UserError for a value that its type or its ``__post_init__`` rejects."""
    made = cast(type[T], dataclass(config=ConfigDict(extra="forbid", allow_inf_nan=False))(kind))
    fill = made.__init__

    @functools.wraps(fill)
    def __init__(self, *args, **kwargs):
        try:
            fill(self, *args, **kwargs)
        except ValidationError as error:
            raise UserError(_in_words(error, "")) from error

    made.__init__ = __init__  # type: ignore[method-assign]
    return made


def from_values(kind: type[T], values: object, name: str = "") -> T:
    """Convert plain values, as read from YAML, to the type ``kind``; mappings become its dataclasses.

    Raises:
        UserError: naming the field (after ``name``), the value and what is accepted.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise UserError(_in_words(error, name)) from error


def _in_words(error: ValidationError, name: str) -> str:
    first = error.errors(include_url=False)[0]
    for part in first["loc"]:
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else str(part)
    reason = first.get("ctx", {}).get("error")
    if isinstance(reason, UserError):  # raised by a __post_init__, which names its own field
        return f"{name}.{reason}" if name else str(reason)
    accepted = str(reason) if reason else first["msg"].removeprefix("Input should be ")
    return f"{name}: got {shown(first['input'])}; accepted: {ACCEPTED.get(first['type'], accepted)}"
