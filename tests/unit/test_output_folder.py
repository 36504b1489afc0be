"""What a conversion does with a folder that appears at its output while it writes."""

import json

import pytest

from latte_flow.tools.conversion.output_folder import check_output, make_partial_folder, put_in_place
from latte_flow.training.checkpoint.formats.source import EXPORT_FILE
from latte_flow.training.errors import UserError


def export(folder, content: str) -> None:
    """Write what a conversion leaves: one file, and the record that lists it."""
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text(content)
    record = {"format": "pt", "weights": "ema", "step": 1}
    files = {"weights": {"bytes": len(content), "sha256": ""}}
    (folder / EXPORT_FILE).write_text(json.dumps(record | {"files": files}))


@pytest.fixture
def partial(tmp_path):
    target = tmp_path / "out[1]"
    check_output(target, tmp_path / "input", force=False)
    folder = make_partial_folder(target)
    export(folder, "new")
    return folder, target


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_made_meanwhile_keeps_its_files(partial, force):
    folder, target = partial
    target.mkdir()
    (target / "diary").write_text("mine")
    with pytest.raises(UserError, match=r"output: .* it is not replaced"):
        put_in_place(folder, target, force=force)
    assert {path.name: path.read_text() for path in target.iterdir()} == {"diary": "mine"}


@pytest.mark.parametrize("force", [False, True])
def test_a_file_made_meanwhile_stays(partial, force):
    folder, target = partial
    target.write_text("mine")
    with pytest.raises(UserError, match=r"output: .* it is not replaced"):
        put_in_place(folder, target, force=force)
    assert target.read_text() == "mine"


def test_an_earlier_conversion_is_replaced_by_force_alone(partial, tmp_path):
    folder, target = partial
    export(target, "old")
    with pytest.raises(UserError, match="appeared during the conversion"):
        put_in_place(folder, target, force=False)
    assert (target / "weights").read_text() == "old"
    put_in_place(folder, target, force=True)
    assert (target / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out[1]"]


def test_a_file_put_into_an_earlier_conversion_is_not_lost(partial):
    folder, target = partial
    export(target, "old")
    (target / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds files that no conversion wrote: notes"):
        put_in_place(folder, target, force=True)
    assert (target / "notes").read_text() == "mine"


def test_what_a_dead_process_left_is_removed_under_a_name_with_brackets(partial, tmp_path):
    folder, target = partial
    left = folder.with_name(folder.name.rpartition("-")[0] + "-4194999")  # above the largest process number of Linux
    left.mkdir()
    folder.rename(tmp_path / "aside")
    make_partial_folder(target)
    assert not left.exists()
