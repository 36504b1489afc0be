"""The command line of training/main.py: YAML files (``--config``) and fields (``--optimizer.lr 1e-3``).

The command line overrides files. Unknown fields are errors.
"""

import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from latte_flow.training.configs.bundled import find_file
from latte_flow.training.configs.checked import from_values, shown
from latte_flow.training.configs.fields import Assumptions, TrainingConfig
from latte_flow.training.errors import UserError

DEFAULT_CONFIG = Path(__file__).parent / "digits.yaml"


class OneLineParser(ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, without the usage text."""

    def error(self, message, ex=None):
        raise UserError(" ".join(str(message).split()))


@dataclass(frozen=True)
class Command:
    """A parsed command line: the run, and whether to only print its cost."""

    config: TrainingConfig
    dry_run: bool
    assume: Assumptions


@functools.cache
def make_parser() -> ArgumentParser:
    """Return the parser of training/main.py: every field of TrainingConfig, with the defaults of the digits preset."""
    parser = OneLineParser(prog="training/main.py", description="Train LaTtE-Flow with DeepSpeed.", exit_on_error=False)
    parser.add_argument("--config", help="YAML file, or a preset's name; default: digits, whose values are shown here")
    # The launcher passes it to each process it starts; DeepSpeed reads the rank from the environment.
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--dry_run", action="store_true", help="print the cost of the run and exit")
    parser.add_class_arguments(Assumptions, "assume")
    parser.add_class_arguments(TrainingConfig)
    parser.set_defaults(dict(_leaves(read_yaml(DEFAULT_CONFIG))))
    return parser


def parse_command(argv: Sequence[str] | None = None) -> Command:
    """Parse a command line. Without ``--config`` the digits preset is the base.

    Raises:
        UserError: for an unknown field, an invalid value or a missing file.
    """
    files, rest = _split_off_files(sys.argv[1:] if argv is None else argv)
    values: dict = {}
    for file in files or [str(DEFAULT_CONFIG)]:
        _merge(values, read_yaml(find_file("config", file, "training/configs", ".yaml")))
    for argument in rest:
        # jsonargparse would append to an empty list: it does not know the list of the file.
        if re.match(r"--[\w.]+\+(=|$)", argument):
            raise UserError(f"{argument}: accepted: the whole list, without the plus")
    try:
        given = make_parser().parse_args(rest, defaults=False)
    except UserError:
        raise
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error
    except (ValueError, OverflowError) as error:  # integers too large for a float or for Python to print
        number = re.search(r"--(\S+?)[ =]-?\d{300}", " ".join(rest))
        raise UserError(f"{number[1] if number else 'command line'}: {error}; accepted: less than 2^64") from error
    given.pop("local_rank", None)
    _merge(values, given.as_dict())  # the command line overrides a file even if it precedes it
    return Command(
        dry_run=from_values(bool, values.pop("dry_run", False), "dry_run"),
        assume=from_values(Assumptions, values.pop("assume", {}), "assume"),
        config=from_values(TrainingConfig, values),
    )


def parse_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """Parse a command line and return the run it describes.

    Raises:
        UserError: as ``parse_command``.
    """
    return parse_command(argv).config


def _split_off_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the values of ``--config`` and the other arguments."""
    files, rest, arguments = [], [], iter(argv)
    for argument in arguments:
        if argument == "--config":
            files.append(next(arguments, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    return files, rest


def read_yaml(path: Path) -> dict:
    """Return the fields set by a file, as plain values.

    Raises:
        UserError: when it cannot be read, is not a YAML mapping, or sets a field twice.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"config: {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # YAML's constructors do not catch errors of float(), int() or a failed match
        raise UserError(f"config: {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict | None):
        raise UserError(f"config: {path} holds a {type(values).__name__}; accepted: a mapping of fields to values")
    return values or {}


class _Loader(yaml.SafeLoader):
    """Rejects a field that is set twice: YAML takes the last one, and the first part of a section would be lost silently."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice} is set twice", node.start_mark)
        return super().construct_mapping(node, deep)


# PyYAML implements YAML 1.1, in which 5e-4 is a string.
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))


def _merge(values: dict, changes: dict, section: str = "") -> None:
    """Update nested dicts recursively; other fields of a section are kept."""
    for name, change in changes.items():
        if name not in values or not isinstance(change, dict):
            values[name] = change
        elif isinstance(values[name], dict):
            _merge(values[name], change, f"{section}{name}.")
        else:
            raise UserError(f"{section}{name}: got {shown(values[name])}; accepted: a mapping of its fields")


def _leaves(values: dict, section: str = ""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{section}{name}.")
        else:
            yield section + name, value
