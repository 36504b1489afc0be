"""Command lines of tools: the arguments come from a function's signature, their help from its docstring."""

import argparse
import inspect
import os
import typing
from collections.abc import Callable
from typing import Any

import docstring_parser
import torch
from jsonargparse import ActionYesNo

from latte_flow.training.configs.checked import check_path, shown
from latte_flow.training.configs.parser import OneLineParser
from latte_flow.training.errors import UserError, exit_code


def run_function(function: Callable, given: Callable[[], dict[str, Any]] = dict) -> int:
    """Call a function with the command line's arguments and those that ``given`` returns; return the exit code.

    Positional parameters become positional arguments, keyword-only ones become options; the docstring's ``Args`` give their help.

    Raises:
        SystemExit: with 0, after ``--help``.
    """

    def program() -> None:
        values = given()
        function(**_parse(function, skip=values.keys()), **values)

    return exit_code(program)


def check_positive(**numbers: int | None) -> None:
    """Raise UserError for a number less than 1; None is accepted."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"{name}: got {value}; accepted: 1 or more")


def find_device(device: str | None) -> str:
    """Return the device that an argument names; None for this rank's GPU, or the CPU on a machine without.

    Raises:
        UserError: when this machine has no such device.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    accepted = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpus else "cpu")
    if device not in accepted:
        raise UserError(f"device: {device!r} is not on this machine; accepted: {', '.join(accepted)}")
    return device


def check_paths(**paths: str | os.PathLike | None) -> None:
    """Raise UserError for a path that is not accepted (training/configs/checked.py)."""
    for name, path in paths.items():
        try:
            check_path(None if path is None else os.fspath(path))
        except ValueError as error:
            raise UserError(f"{name}: got {shown(path)}; accepted: {error}") from error


def _parse(function: Callable, skip: typing.KeysView[str]) -> dict[str, Any]:
    doc = docstring_parser.parse(function.__doc__)
    help_of = {param.arg_name: param.description for param in doc.params}
    # jsonargparse cannot express these from a signature: flags without a value, options with several values, optional positional
    # arguments. They are added to those that it finds.
    special = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.annotation is bool:
            special[name] = f"--{name}", {"action": ActionYesNo(yes_prefix="", no_prefix="no_")}
        elif list[str] in (parameter.annotation, *typing.get_args(parameter.annotation)):
            special[name] = f"--{name}", {"nargs": "+"}
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is not parameter.empty:
            special[name] = name, {"nargs": "?"}
        if name in special:
            special[name][1].update(default=parameter.default, help=help_of[name])
    parser = OneLineParser(description=doc.short_description)
    # Passed by the deepspeed launcher, which also sets it in the environment.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=special.keys() | skip)
    for argument, options in special.values():
        parser.add_argument(argument, **options)
    arguments = parser.parse_args().as_dict()
    del arguments["local_rank"]
    return arguments
