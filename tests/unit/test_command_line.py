"""Command lines from signatures: what documented commands look like, and one line for what is wrong."""

import importlib
import inspect
import sys
from typing import Literal

import docstring_parser
import pytest

from latte_flow.tools.benchmark import benchmark
from latte_flow.tools.command_line import check_positive, run_function
from latte_flow.tools.convert_checkpoint import convert_checkpoint
from latte_flow.tools.digit_accuracy import score
from latte_flow.tools.encode_latents import encode_latents
from latte_flow.tools.sample import sample
from latte_flow.training.errors import UserError


@pytest.fixture
def call(monkeypatch):
    """Call a function that has one parameter of each kind; return its exit code and the arguments that it got."""
    got = {}

    def draw(
        source: str,
        target: str | None = None,
        *,
        output: str,
        prompts: list[str] | None = None,
        classes: str | None = None,
        solver: Literal["euler", "heun"] = "euler",
        steps: int = 40,
        seed: int | None = None,
        verify: bool = False,
        flip: bool = True,
        rank: int = 0,
    ) -> None:
        """Draw something.

        Args:
            source: what it is drawn from
            target: where it goes
            output: the folder
            prompts: the captions
            classes: the classes
            solver: the solver
            steps: the steps
            seed: the seed
            verify: look again
            flip: mirrored too
            rank: not an option
        """
        got.update(locals())

    def run(*arguments: str) -> tuple[int, dict]:
        got.clear()
        monkeypatch.setattr(sys, "argv", ["draw.py", *arguments])
        return run_function(draw, lambda: {"rank": 3}), {name: value for name, value in got.items() if name != "got"}

    return run


def test_defaults(call):
    expected = {"source": "a", "target": None, "output": "b", "prompts": None, "classes": None, "solver": "euler"}
    expected |= {"steps": 40, "seed": None, "verify": False, "flip": True, "rank": 3}
    assert call("a", "--output", "b") == (0, expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--prompts", "a red fox", "null", "3", "[1]", "k: v", ""], {"prompts": ["a red fox", "null", "3", "[1]", "k: v", ""]}),
        (["--prompts=one"], {"prompts": ["one"]}),
        (["--classes", "0,1"], {"classes": "0,1"}),
        (["--classes", "3"], {"classes": "3"}),
        (["--verify", "--seed", "7"], {"verify": True, "seed": 7}),
        (["--no_flip"], {"flip": False}),
        (["--flip", "--solver", "heun"], {"flip": True, "solver": "heun"}),
        (["--steps", "-1"], {"steps": -1}),
        (["--local_rank=1"], {}),
        (["--local_rank", "1"], {}),
    ],
)  # fmt: skip
def test_options(call, arguments, expected):
    code, got = call("a", *arguments, "--output", "b")
    assert code == 0
    assert got["source"] == "a"
    assert got["output"] == "b"
    assert got == got | expected


@pytest.mark.parametrize("number", ["007", "1e3", "null", "true"])
def test_names_of_files_stay_what_they_are(call, number):
    code, got = call(number, number, "--output", number)
    assert (code, got["source"], got["target"], got["output"]) == (0, number, number, number)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["required", "source"]),
        (["a"], ["required", "output"]),
        (["a", "b", "c", "--output", "d"], ["unrecognized", "c"]),
        (["a", "--output", "b", "--colour", "red"], ["unrecognized", "--colour"]),
        (["a", "--output", "b", "--rank", "1"], ["unrecognized", "--rank"]),
        (["a", "--output", "b", "--steps", "many"], ["steps", "int", "many"]),
        (["a", "--output", "b", "--steps", "1.5"], ["steps", "int", "1.5"]),
        (["a", "--output", "b", "--solver", "rk4"], ["solver", "euler", "heun", "rk4"]),
        (["a", "--output", "b", "--prompts"], ["--prompts", "at least one"]),
        (["a", "t", "--output", "b", "--verify", "true"], ["unrecognized", "true"]),
    ],
)
def test_what_is_wrong_is_one_line(call, capsys, arguments, words):
    code, got = call(*arguments)
    printed = capsys.readouterr()
    assert (code, got, printed.out) == (2, {}, "")
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert all(word in printed.err for word in words)


def test_help_tells_meanings_and_defaults(call, capsys):
    with pytest.raises(SystemExit) as ended:
        call("--help")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "Draw something.",
        "source what it is drawn from",
        "the captions",
        "the steps (type: int, default: 40)",
    ):
        assert words in text
    assert "rank" not in text


@pytest.mark.parametrize("function", [sample, encode_latents, convert_checkpoint, benchmark, score])
def test_every_argument_of_the_tools_is_described(function):
    doc = docstring_parser.parse(function.__doc__)
    assert [param.arg_name for param in doc.params] == list(inspect.signature(function).parameters)
    assert all(param.description for param in doc.params)


def test_numbers_less_than_one():
    check_positive(steps=1, batch_size=None)
    with pytest.raises(UserError, match=r"batch_size: got 0; accepted: 1 or more"):
        check_positive(steps=1, batch_size=0)


@pytest.mark.parametrize(
    ("tool", "arguments", "field"),
    [
        ("sample", ["runs/lr[12]", "--output", "x"], "checkpoint"),
        ("sample", ["runs/x", "--output", "a*"], "output"),
        ("convert_checkpoint", ["runs/lr[12]", "x", "--to", "pt"], "path"),
        ("convert_checkpoint", ["runs/x", "b::c", "--to", "pt"], "output"),
        ("encode_latents", ["--source", "a?", "--output", "x"], "source"),
    ],
)  # fmt: skip
def test_paths_that_a_library_reads_as_patterns_are_refused(monkeypatch, capsys, tool, arguments, field):
    monkeypatch.setattr("sys.argv", [tool, *arguments])
    assert importlib.import_module(f"latte_flow.tools.{tool}").run() == 2
    assert capsys.readouterr().err.startswith(f"error: {field}: got ")
