"""Who may import whom: tools -> training -> model, and inside training the order of docs/architecture.md."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("model", "training", "tools")
ORDER = (
    ("errors", "durable"),
    ("configs",),
    ("distributed",),
    ("data",),
    ("optimizer",),
    ("checkpoint",),
    ("monitor", "evaluation"),
    ("components", "run_folder", "run_lock", "initial_weights"),
    ("doctor",),
    ("objectives",),
    ("dry_run", "trainer"),
    ("main",),
)
"""The files and folders of training/, low to high: each imports its own line and the lines above it."""
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
FOREIGN_TO_MODEL = ("deepspeed", "megatron")


def product_files(room: str) -> list[Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import that runs, also those inside functions; each imported name counts as a module."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = ["latte_flow", *path.relative_to(ROOT).parts[: -node.level]] if node.level else []
            module = ".".join([*package, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def offenders(room: str, is_wrong) -> list[str]:
    """Return file:line and name of the imports of a room that a rule finds wrong."""
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in product_files(room)
        for line, name in imports(path)
        if is_wrong(path, name)
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_from_tools_to_training_to_model(room):
    above = [f"latte_flow.{name}." for name in ROOMS[ROOMS.index(room) + 1 :]]
    assert len(product_files(room)) > 5
    assert offenders(room, lambda _, name: f"{name}.".startswith(tuple(above))) == []


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_are_imported_by_their_full_names(room):
    """``import model`` works from the root of a checkout only, and would load every module twice."""
    assert offenders(room, lambda _, name: name.split(".")[0] in ROOMS) == []


def test_model_imports_no_distributed_training_library():
    assert offenders("model", lambda _, name: name.split(".")[0] in FOREIGN_TO_MODEL) == []


def test_model_raises_no_plain_value_error():
    """Callers turn an ArgumentError into one line; a plain ValueError is a bug and keeps its traceback."""
    found = [path.name for path in product_files("model") if "raise ValueError" in path.read_text()]
    assert found == []


def test_training_imports_downwards():
    names = {path.stem if path.is_file() else path.name for path in (ROOT / "training").iterdir()}
    assert names - {"__init__", "__pycache__"} <= LEVEL.keys(), "a file or folder that ORDER does not place"

    def goes_up(path: Path, name: str) -> bool:
        package, _, rest = name.partition("latte_flow.training.")
        target = rest.split(".")[0]
        own = Path(path.relative_to(ROOT / "training").parts[0]).stem
        return not package and target in LEVEL and own in LEVEL and LEVEL[target] > LEVEL[own]

    assert offenders("training", goes_up) == []


@pytest.mark.parametrize(
    "content", ["from latte_flow.tools import sample", "def f():\n    import latte_flow.tools.sample"]
)
def test_a_wrong_arrow_is_found(tmp_path, monkeypatch, content):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.py").write_text(f"if TYPE_CHECKING:\n    import latte_flow.tools.allowed\n{content}\n")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = offenders("model", lambda _, name: name.startswith("latte_flow.tools"))
    assert [line.split(" imports ")[1] for line in found] == ["latte_flow.tools.sample"]


@pytest.mark.slow
def test_what_is_imported_and_what_is_not():
    """The package itself imports nothing heavy, model/ neither DeepSpeed nor training/; the public names are there."""
    modules = [f"latte_flow.model.{path.stem}" for path in product_files("model") if path.stem != "__init__"]
    program = (
        "import sys, latte_flow\n"
        "print([name for name in ('torch', 'transformers', 'diffusers') if name in sys.modules])\n"
        f"import {', '.join(modules)}\n"
        f"print([n for n in sys.modules if n.split('.')[0] in {FOREIGN_TO_MODEL} or 'latte_flow.training' in n])\n"
        "from latte_flow import LatteFlowModel, LatteFlowPipeline, load_pipeline\n"
        "print(LatteFlowModel.__module__, LatteFlowPipeline.__module__, load_pipeline.__module__)\n"
        "print({'load_pipeline', '__version__'} <= set(dir(latte_flow)), hasattr(latte_flow, 'nothing'))\n"
    )
    settings = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    public = "latte_flow.model.latte_flow latte_flow.model.pipeline latte_flow.training.checkpoint.opening"
    assert done.stdout.splitlines() == ["[]", "[]", public, "True False"]
