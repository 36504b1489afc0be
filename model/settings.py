"""The settings of a pipeline that are read from files, checked: what becomes a prompt, and where the VLM is."""

import os
import reprlib
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from latte_flow.model.errors import ArgumentError
from latte_flow.model.files import locate

MAX_CHARACTERS = 2**20
"""Longest user message, before and after it is rendered in the VLM's chat format."""
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
T = TypeVar("T")


def check_template(text: str) -> str:
    """Reject a template unless ``template.format(x)`` inserts x unchanged in exactly one place."""
    try:
        blanks = [blank for _, *blank in string.Formatter().parse(text) if blank[0] is not None]
    except ValueError:  # a single brace
        blanks = []
    if blanks != [["", "", None]]:  # name, format and conversion: {:>9999999999} would exhaust memory
        raise ArgumentError("a text with {} exactly once (other braces doubled)")
    return text


Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
PromptTemplate = Annotated[Text, AfterValidator(check_template)]


@dataclass(config=STRICT, kw_only=True)
class PromptSettings:
    """The settings that all saved pipelines have.

    Attributes:
        prompt_template: the user message; {} stands for the class name or the caption.
        null_prompt: the user message of the null condition.
        max_prompt_tokens: longer user messages are truncated at the end; None disables truncation.
        class_names: names of the classes, or None for free prompts.
        vlm_path: hub id of the VLM, or its folder; a relative one starts at the folder of these settings. None if it is saved
            with them.
        vlm_fingerprint: fingerprint of the VLM's files, None without a path; see model.backbone.fingerprint.
    """

    prompt_template: PromptTemplate
    null_prompt: Text
    max_prompt_tokens: Annotated[int, Field(gt=0)] | None = None
    class_names: list[Text] | None = None
    vlm_path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    vlm_fingerprint: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None


def read_settings(kind: Callable[..., T], values: Any) -> T:
    """Return settings made of values that were read from a file.

    Raises:
        ArgumentError: names the first field that is unknown, missing, or has a value of another type or out of range.
    """
    if not isinstance(values, Mapping):
        raise ArgumentError(f"got {reprlib.repr(values)}; accepted: an object, name -> value")
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        accepted = first.get("ctx", {}).get("error") or first["msg"]
        raise ArgumentError(f"{name}: got {reprlib.repr(first['input'])}; accepted: {accepted}") from error


def portable_path(path: str | None) -> str | None:
    """Return what an export records of the path of a VLM or an autoencoder: a hub id, or a folder beside the export.

    An absolute path would tell where the export was made, and mean nothing elsewhere.
    """
    return path if path is None or not os.path.isabs(path) else f"../{Path(path).name}"


def locate_saved(path: str, folder: Path, argument: str) -> str:
    """Return the folder of a VLM or an autoencoder that saved settings refer to.

    Args:
        path: as in the settings.
        folder: the folder of the settings.
        argument: what a caller can give instead, for the error message.

    Raises:
        ArgumentError: when it is missing; a hub id must be in the local cache.
    """
    try:
        return locate(os.path.normpath(folder / path) if path.startswith("../") else path, download=False)
    except ValueError as error:
        raise ArgumentError(f"{error} ({argument})") from error
