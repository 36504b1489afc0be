"""The command line of training/main.py: YAML files (``--config``) and fields (``--optimizer.lr 1e-3``), read by jsonargparse.

The command line wins over files. Unknown fields are errors.
"""

import dataclasses
import functools
import inspect
import re
import sys
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser, Namespace
from transformers import PretrainedConfig

from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.training.configs.fields import Assumptions, TrainingConfig
from latte_flow.training.configs.yaml_file import check_config_file, plain_values
from latte_flow.training.errors import UserError

DEFAULT_CONFIG = Path(__file__).parent / "digits.yaml"

# The VLM and the codec decide these; everything else of the network's configuration can be set under ``model``.
DERIVED_MODEL_FIELDS = {"vlm_config", "latent_channels", "latent_size"}


class OneLineParser(ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, without the page of usage in front of it."""

    def error(self, message, ex=None):
        raise UserError(" ".join(str(message).split()))


@dataclass(frozen=True)
class Command:
    """A parsed command line: the run, and whether to only say what it would cost."""

    config: TrainingConfig
    dry_run: bool
    assume: Assumptions


@functools.cache
def make_parser() -> ArgumentParser:
    """Return the parser of training/main.py: every field of TrainingConfig, and the network's under ``model``."""
    parser = OneLineParser(prog="training/main.py", description="Train LaTtE-Flow with DeepSpeed.", exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file of fields; default: the digits preset")
    # The launcher names the rank of each process it starts; DeepSpeed reads it from the environment.
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    parser.add_argument("--dry_run", action="store_true", help="print what the run would cost, and stop")
    parser.add_class_arguments(Assumptions, "assume")
    parser.add_class_arguments(TrainingConfig, skip={"model"})
    inherited = {f.name for f in dataclasses.fields(PretrainedConfig)}
    parser.add_class_arguments(LatteFlowConfig, "model", skip=DERIVED_MODEL_FIELDS | inherited)
    return parser


def parse_command(argv: Sequence[str] | None = None) -> Command:
    """Parse a command line. Without ``--config`` the digits preset is the start.

    Raises:
        UserError: for an unknown field, a value of the wrong type, a missing file.
    """
    files, rest = _split_off_files(sys.argv[1:] if argv is None else argv)
    files = files or [str(DEFAULT_CONFIG)]
    for file in files:
        check_config_file(file, _sections(TrainingConfig) | {"model", "assume"})
    parser = make_parser()
    try:
        # Later arguments win: the files come first wherever they stand on the command line.
        namespace = parser.parse_args([f"--config={file}" for file in files] + rest)
    except UserError:
        raise
    except ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from error
    except (ValueError, OverflowError) as error:  # of integers that are no floats, or that Python does not even print
        number = re.search(r"(\S+?)[ =]-?\d{300}", " ".join(rest))
        raise UserError(
            f"{number[1].lstrip('-') if number else files[-1]}: {error}; accepted: less than 2^64"
        ) from error
    _check_values({f.name: f.type for f in dataclasses.fields(TrainingConfig) if f.name != "model"}, namespace)
    _check_values({"model": _network_fields(), "assume": Assumptions}, namespace)
    if not isinstance(namespace.dry_run, bool):
        raise UserError(f"dry_run: got {namespace.dry_run!r}; accepted: true or false")
    model = plain_values(namespace.model.as_dict())
    fields = parser.instantiate(namespace)
    names = [f.name for f in dataclasses.fields(TrainingConfig) if f.name != "model"]
    config = TrainingConfig(**{name: fields[name] for name in names}, model=model)
    return Command(config=config, dry_run=fields["dry_run"], assume=fields["assume"])


def _split_off_files(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the values of ``--config``, and the other arguments."""
    files, rest, arguments = [], [], iter(argv)
    for argument in arguments:
        if argument == "--config":
            files.append(next(arguments, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    return files, rest


def _sections(fields: type, prefix: str = "") -> set[str]:
    """Return the dotted names of the fields of a dataclass that are dataclasses, at any depth."""
    inner = {f"{prefix}{f.name}": f.type for f in dataclasses.fields(fields) if dataclasses.is_dataclass(f.type)}
    return inner.keys() | {name for field, kind in inner.items() for name in _sections(kind, f"{field}.")}


def _network_fields() -> dict:
    """Return the type of every field that can be set under ``model``."""
    parameters = inspect.signature(LatteFlowConfig.__init__).parameters.values()
    return {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in DERIVED_MODEL_FIELDS}


def _check_values(types: dict, values: Namespace, prefix: str = "") -> None:
    """Raise UserError for a null or a missing section, both of which jsonargparse lets through."""
    for name, accepted in types.items():
        value = values.get(name)
        if dataclasses.is_dataclass(accepted):
            accepted = {f.name: f.type for f in dataclasses.fields(accepted)}
        if isinstance(accepted, dict):
            if not isinstance(value, Namespace):
                raise UserError(f"{prefix}{name}: got {value!r}; accepted: the fields {', '.join(accepted)}")
            _check_values(accepted, value, f"{prefix}{name}.")
        elif value is None and type(None) not in typing.get_args(accepted):
            raise UserError(f"{prefix}{name}: got null; accepted: {getattr(accepted, '__name__', accepted)}")


def parse_config(argv: Sequence[str] | None = None) -> TrainingConfig:
    """Parse a command line and return the run it describes.

    Raises:
        UserError: as ``parse_command``.
    """
    return parse_command(argv).config
