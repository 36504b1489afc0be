"""Command lines of tools: a function's signature gives the arguments, its docstring their meaning."""

import argparse
import inspect
import typing
from collections.abc import Callable
from typing import Any

import docstring_parser
from jsonargparse import ActionYesNo

from latte_flow.training.configs.parser import OneLineParser
from latte_flow.training.errors import UserError, exit_code


def run_function(function: Callable, **given: Any) -> int:
    """Call a function with the arguments of the command line, and with ``given``; return the exit code.

    Positional parameters are positional arguments, keyword-only ones are options; ``Args`` of the docstring says what they mean.

    Raises:
        SystemExit: with 0, after ``--help``.
    """
    return exit_code(lambda: function(**_parse(function, skip=given.keys()), **given))


def check_positive(**numbers: int | None) -> None:
    """Raise UserError for a number less than 1; None is accepted."""
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"{name}: got {value}; accepted: 1 or more")


def _parse(function: Callable, skip: typing.KeysView[str]) -> dict[str, Any]:
    doc = docstring_parser.parse(function.__doc__)
    help_of = {param.arg_name: param.description for param in doc.params}
    # jsonargparse's auto_cli has no words for these: flags without a value, several words after one option, a positional argument
    # that may be left out. They are added to what it finds in the signature.
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
    # Set by the deepspeed launcher, which puts it into the environment too.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=special.keys() | skip)
    for argument, options in special.values():
        parser.add_argument(argument, **options)
    arguments = parser.parse_args().as_dict()
    del arguments["local_rank"]
    return arguments
