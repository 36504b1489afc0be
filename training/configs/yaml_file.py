"""A configuration file, looked through as plain values before jsonargparse reads it.

jsonargparse takes text in a section's place for the name of a file or of a class, and imports what ``class_path`` names; a list
of some thousand values, or aliases that stand for as many, keep it busy for hours. None of that has a use in a run's
configuration, so such files are refused.
"""

from collections.abc import Iterator
from pathlib import Path

import yaml

from latte_flow.training.errors import UserError

MAX_BYTES = 2**16
MAX_VALUES = 1000
MAX_DEPTH = 8
MAX_BITS = 64


def check_config_file(path: str, sections: set[str]) -> None:
    """Refuse a file that is no YAML mapping of fields to values.

    Args:
        path: the file.
        sections: dotted names of the fields that have fields of their own; only these are mappings.

    Raises:
        UserError: naming the file, and the field where it is one.
    """
    for name, value in _fields(_read(path), path):
        inside = name.rpartition(".")[2]
        if inside in ("class_path", "config") or inside.startswith("__"):  # they would be imported, read, left out
            raise UserError(f"config: {path} sets {name}; accepted: the fields of a configuration")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:  # beyond some size Python does not even print them
            raise UserError(f"{name}: got an integer of {value.bit_length()} bits; accepted: at most {MAX_BITS}")
        if isinstance(value, dict) != (name in sections):
            got = repr(value)[:80] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
            accepted = "a mapping of its fields" if name in sections else "a value, it has no fields"
            raise UserError(f"{name}: got {got} in {path}; accepted: {accepted}")


def _read(path: str) -> dict:
    if not Path(path).is_file():  # nor a device or a pipe, which may have no end
        raise UserError(f"config: {path} not found; accepted: a YAML file")
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"config: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"config: {path} is no YAML: {error}") from error
    if len(text) > MAX_BYTES:
        raise UserError(f"config: {path} is larger than {MAX_BYTES} bytes; accepted: a YAML file of fields")
    try:
        tree = yaml.load(text, Loader=_Loader)
    except Exception as error:  # its constructors let pass whatever float(), int() or a missing match raise
        raise UserError(f"config: {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict | None):
        raise UserError(f"config: {path} holds a {type(tree).__name__}; accepted: a mapping of fields to values")
    return tree or {}


class _Loader(yaml.SafeLoader):
    """Refuses a field that is set twice: YAML takes the last one, and a section's first part would be lost without a word."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is set twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _fields(tree: dict, path: str) -> Iterator[tuple[str, object]]:
    """Yield (dotted name, value) of everything in a tree; the items of a list have their list's name and a number."""
    left, count = [("", tree, 0)], 0
    while left:
        name, value, depth = left.pop()
        if name:
            yield name, value
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise UserError(f"config: {path} has a field in {name or 'it'} whose name is no text")
            items = [(f"{name}.{key}" if name else key, item) for key, item in value.items()]
        elif isinstance(value, list | tuple | set):
            items = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
        else:
            continue
        count += len(items)
        if count > MAX_VALUES or depth == MAX_DEPTH:
            raise UserError(
                f"config: {path} holds more than {MAX_VALUES} values, or more than {MAX_DEPTH} inside another"
            )
        left += [(name, item, depth + 1) for name, item in items]


def plain_values(value):
    """Return nested dicts and lists of values with lists in place of tuples: YAML has none."""
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    return [plain_values(item) for item in value] if isinstance(value, tuple | list) else value
