"""Committed checkpoints as files: found when whole, refused when anything in them is missing, cut off or changed."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latte_flow.training.checkpoint.manifest import check_files, list_checkpoints, read_manifest, step_name
from latte_flow.training.checkpoint.opening import find_checkpoint, load_pipeline
from latte_flow.training.checkpoint.store import CheckpointStore
from latte_flow.training.errors import UserError

CONTENTS = {
    "mp_rank_00_model_states.pt": b"model" * 50,
    "bf16_zero_pp_rank_0_optim_states.pt": bytes(range(256)),
    "empty": b"",
}
MODEL = "mp_rank_00_model_states.pt"


def entries(contents: dict[str, bytes]) -> dict:
    return {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in contents.items()}


def write_checkpoint(output_dir: Path, step: int, contents: dict[str, bytes] = CONTENTS) -> Path:
    """Write a checkpoint as the documented format says: the files, and a manifest of their sizes and SHA-256."""
    folder = output_dir / "checkpoints" / f"step_{step:07d}"
    folder.mkdir(parents=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    manifest = {"step": step, "world_size": 1, "zero_stage": 2, "files": entries(contents)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def problems(folder: Path) -> dict[str, str]:
    return dict(check_files(folder, list))


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path, 7)


class TestCheckFiles:
    def test_a_whole_checkpoint_has_no_problems(self, folder):
        assert problems(folder) == {}

    def test_a_missing_file(self, folder):
        (folder / MODEL).unlink()
        assert problems(folder) == {MODEL: "is missing"}

    @pytest.mark.parametrize("length", [0, 1, 249])
    def test_a_truncated_file(self, folder, length):
        (folder / MODEL).write_bytes(CONTENTS[MODEL][:length])
        assert problems(folder) == {MODEL: f"has {length} bytes instead of 250"}

    def test_a_file_that_grew(self, folder):
        (folder / "empty").write_bytes(b"x")
        assert problems(folder) == {"empty": "has 1 bytes instead of 0"}

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(position=st.integers(0, 249), bit=st.integers(0, 7))
    def test_any_flipped_bit(self, folder, position, bit):
        content = bytearray(CONTENTS[MODEL])
        content[position] ^= 1 << bit
        (folder / MODEL).write_bytes(content)
        assert problems(folder) == {MODEL: "has another SHA-256 than the manifest"}

    def test_two_files_exchanged(self, tmp_path):
        folder = write_checkpoint(tmp_path, 1, {"a_model_states.pt": b"12", "b_optim_states.pt": b"21"})
        (folder / "a_model_states.pt").write_bytes(b"21")
        (folder / "b_optim_states.pt").write_bytes(b"12")
        assert set(problems(folder)) == {"a_model_states.pt", "b_optim_states.pt"}

    def test_a_folder_in_a_files_place(self, folder):
        (folder / MODEL).unlink()
        (folder / MODEL).mkdir()
        assert problems(folder) == {MODEL: "is missing"}

    def test_each_rank_checks_its_share(self, folder):
        for path in CONTENTS:
            (folder / path).unlink()
        shares = [dict(check_files(folder, lambda names, r=r: names[r::2])) for r in (0, 1)]
        assert not shares[0].keys() & shares[1].keys()
        assert shares[0].keys() | shares[1].keys() == CONTENTS.keys()

    @pytest.mark.parametrize(
        "manifest",
        ["", "{", "[]", "{}", "null", '{"step": 1}', '{"step": 1, "world_size": 1, "zero_stage": 2, "files": []}',
         '{"step": "1", "world_size": 1, "zero_stage": 2, "files": {}}', '{"step": 1, "files": {}}'],
    )  # fmt: skip
    def test_a_damaged_manifest_is_the_problem(self, folder, manifest):
        (folder / "manifest.json").write_text(manifest)
        assert list(problems(folder)) == ["manifest.json"]
        with pytest.raises(UserError, match=rf"{folder}/manifest.json: damaged"):
            read_manifest(folder)

    @pytest.mark.parametrize(
        "changed",
        [
            {"step": -1}, {"step": True}, {"step": 2**63}, {"step": 7.0}, {"step": float("nan")}, {"step": None},
            {"world_size": 0}, {"world_size": 2}, {"world_size": True}, {"zero_stage": 4}, {"zero_stage": "2"},
            {"files": {}}, {"files": {MODEL: {"bytes": 250, "sha256": "0" * 64}}}, {"sha256": "0" * 64}, {"sha256": None},
            {"tensor_parallel": 2}, {"tensor_parallel": 0}, {"tensor_parallel": True}, {"tensor_parallel": None},
        ],
        ids=str,
    )  # fmt: skip
    def test_a_manifest_that_no_run_writes_is_damaged(self, folder, changed):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | changed))
        assert list(problems(folder)) == ["manifest.json"]

    @pytest.mark.parametrize(
        ("ranks", "tensor_parallel", "models", "whole"),
        [(4, 2, 2, True), (2, 2, 2, True), (3, 2, 2, False), (4, 2, 1, False), (4, 1, 2, False), (4, 4, 2, False)],
    )
    def test_tensor_parallel_ranks_have_a_file_of_weights_each(self, tmp_path, ranks, tensor_parallel, models, whole):
        files = {f"mp_rank_{i:02d}_model_states.pt": b"x" for i in range(models)}
        files |= {f"zero_pp_rank_{i}_mp_rank_00_optim_states.pt": b"y" for i in range(ranks)}
        folder = write_checkpoint(tmp_path, 7, files)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest |= {"world_size": ranks, "tensor_parallel": tensor_parallel}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert (not problems(folder)) == whole

    @pytest.mark.parametrize("depth", [20, 100_000])
    def test_a_manifest_of_nested_lists(self, folder, depth):
        (folder / "manifest.json").write_text('{"files": ' + "[" * depth + "]" * depth + "}")
        assert list(problems(folder)) == ["manifest.json"]

    @pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", ".", "", "a\0b", "a" * 256, "\ud800"])
    def test_a_manifest_does_not_lead_out_of_its_folder(self, folder, name):
        secret = b"not a checkpoint's"
        (folder.parent / "secret").write_bytes(secret)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"] |= entries({name: secret})
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert list(problems(folder)) == ["manifest.json"]

    @pytest.mark.parametrize("size", [-1, True, 250.0, float("nan"), float("inf"), 2**63, 10**400])
    def test_a_size_that_no_file_has(self, folder, size):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][MODEL]["bytes"] = size
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert list(problems(folder)) == ["manifest.json"]

    @pytest.mark.parametrize(
        "entry", [{}, {"bytes": 250}, {"sha256": "0"}, {"bytes": "250", "sha256": "0"}, None, 3, []]
    )
    def test_a_damaged_entry_of_the_manifest(self, folder, entry):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][MODEL] = entry
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert problems(folder)

    def test_a_manifest_that_is_no_text(self, folder):
        (folder / "manifest.json").write_bytes(b"\xff\x00\xfe")
        assert list(problems(folder)) == ["manifest.json"]

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(length=st.integers(0, 60), position=st.integers(0, 60), byte=st.integers(0, 255))
    def test_no_damage_to_the_manifest_ends_in_another_error(self, folder, length, position, byte):
        """Cut off at any place, or with any byte of its head changed: problems or none, but no traceback."""
        whole = json.dumps({"step": 7, "world_size": 1, "zero_stage": 2, "files": entries(CONTENTS)}).encode()
        cut = whole[: max(len(whole) - 1 - length, 0)]
        changed = whole[:position] + bytes([byte]) + whole[position + 1 :]
        (folder / "manifest.json").write_bytes(cut)
        assert problems(folder)
        (folder / "manifest.json").write_bytes(changed)
        assert all(isinstance(what, str) for what in problems(folder).values())


class TestReadManifest:
    def test_returns_what_was_written(self, folder):
        manifest = read_manifest(folder)
        assert (manifest["step"], manifest["world_size"], set(manifest["files"])) == (7, 1, set(CONTENTS))

    def test_a_missing_one_names_the_path(self, tmp_path):
        with pytest.raises(UserError, match=rf"{tmp_path}/manifest.json: not found"):
            read_manifest(tmp_path)


class TestFindCheckpoint:
    def test_the_newest_of_an_output_dir(self, tmp_path):
        for step in (100, 9, 20):
            write_checkpoint(tmp_path, step)
        assert find_checkpoint(tmp_path).name == "step_0000100"

    def test_one_steps_folder_itself(self, tmp_path):
        older, _ = (write_checkpoint(tmp_path, step) for step in (1, 2))
        assert find_checkpoint(older) == older

    def test_falls_back_over_damaged_ones(self, tmp_path):
        folders = [write_checkpoint(tmp_path, step) for step in (1, 2, 3, 4)]
        (folders[3] / MODEL).unlink()
        (folders[2] / MODEL).write_bytes(b"short")
        assert find_checkpoint(tmp_path) == folders[1]

    def test_latest_does_not_decide(self, tmp_path):
        """DeepSpeed's marker may name a step whose files never came."""
        folder = write_checkpoint(tmp_path, 1)
        (tmp_path / "checkpoints" / "latest").write_text("step_0000099")
        assert find_checkpoint(tmp_path) == folder

    def test_partial_ones_are_none(self, tmp_path):
        whole = write_checkpoint(tmp_path, 1)
        write_checkpoint(tmp_path, 2).rename(tmp_path / "checkpoints" / "step_0000002.partial")
        (tmp_path / "checkpoints" / "step_0000003").write_text("no folder")
        (tmp_path / "checkpoints" / "step_x").mkdir()
        assert list_checkpoints(tmp_path / "checkpoints") == [whole]
        assert find_checkpoint(tmp_path) == whole

    def test_a_step_that_lost_its_manifest_is_damaged_and_not_forgotten(self, tmp_path, caplog):
        """A folder gets its name when its manifest is in it: without one something was removed."""
        whole, torn = (write_checkpoint(tmp_path, step) for step in (1, 2))
        (torn / "manifest.json").unlink()
        assert list_checkpoints(tmp_path / "checkpoints") == [whole, torn]
        assert find_checkpoint(tmp_path) == whole
        assert f"{torn} skipped: manifest.json " in caplog.text
        with pytest.raises(UserError, match=rf"{torn}: damaged: manifest.json "):
            find_checkpoint(torn)

    def test_a_damaged_step_that_was_named_is_refused_and_says_what(self, folder):
        (folder / MODEL).write_bytes(b"short")
        with pytest.raises(UserError, match=rf"{folder}: damaged: {MODEL} has 5 bytes instead of 250"):
            find_checkpoint(folder)

    @pytest.mark.parametrize("load", [find_checkpoint, load_pipeline], ids=["find", "load_pipeline"])
    def test_nothing_there_names_what_is_accepted(self, tmp_path, load):
        message = rf"{tmp_path}.*: holds no valid checkpoint; accepted: a training output_dir"
        for path in (tmp_path, tmp_path / "missing"):
            with pytest.raises(UserError, match=message):
                load(path)

    def test_all_damaged(self, folder, tmp_path):
        (folder / MODEL).unlink()
        with pytest.raises(UserError, match=r"holds no valid checkpoint"):
            find_checkpoint(tmp_path)

    def test_steps_beyond_seven_digits_are_the_newest(self, tmp_path):
        for step in (9_999_999, 10_000_000):
            assert write_checkpoint(tmp_path, step).name == step_name(step)
        assert find_checkpoint(tmp_path).name == "step_10000000"


def test_a_damaged_later_step_does_not_push_out_the_one_that_was_saved(tmp_path):
    """Step 3 was found damaged, the run went on from step 1 and saves step 2, keeping one."""
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    for step in (1, 2, 3):
        write_checkpoint(tmp_path, step)
    saved, damaged = (store.folder / step_name(step) for step in (2, 3))
    (damaged / MODEL).unlink()
    partial = saved.rename(f"{saved}.partial")
    store._commit(partial, saved, json.loads((partial / "manifest.json").read_text()))
    store.clean_up(saved)
    assert [path.name for path in list_checkpoints(store.folder)] == [saved.name, damaged.name]
    assert find_checkpoint(tmp_path) == saved


def test_what_a_kill_in_the_clean_up_left_over_is_removed(tmp_path):
    """Killed while step 1 was removed and before ``latest`` named step 3; two are kept."""
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    half_removed, *kept = (write_checkpoint(tmp_path, step) for step in (1, 2, 3))
    (half_removed / "manifest.json").unlink()
    (store.folder / "latest").write_text("step_0000002")
    (store.folder / "latest.partial-host-1").write_text("step_00")
    (store.folder / "step_0000003.partial").mkdir()
    store.clean_up(kept[-1])
    assert sorted(store.folder.iterdir()) == [store.folder / "latest", *kept]
    assert (store.folder / "latest").read_text() == "step_0000003"
    assert [problems(path) for path in kept] == [{}, {}]


def test_old_ones_that_cannot_be_removed_take_nothing_from_the_new_one(tmp_path, monkeypatch, capsys):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    for step in (1, 2):
        write_checkpoint(tmp_path, step)

    def busy(path):
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr("latte_flow.training.checkpoint.store.shutil.rmtree", busy)
    store.clean_up(store.folder / step_name(2))
    assert "step_0000002 is saved, but old ones could not be removed: [Errno 16]" in capsys.readouterr().out
    assert (store.folder / "latest").read_text() == step_name(2)
    assert [path.name for path in list_checkpoints(store.folder)] == [step_name(1), step_name(2)]


def test_a_shard_that_the_manifest_does_not_list(folder):
    (folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"of another run")
    (folder / "notes.txt").write_text("a user's own")
    assert problems(folder) == {
        "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt": "is a shard that the manifest does not list"
    }


@pytest.mark.parametrize("name", ["step_0000008", "step_00000007", "step_" + "\u0660" * 6 + "\u0667"])
def test_a_step_under_another_name(folder, name):
    renamed = folder.rename(folder.with_name(name))
    if name.isascii():
        with pytest.raises(
            UserError, match=r"checkpoint of step 7; accepted: its name, step_0000007, or another place"
        ):
            raise UserError(CheckpointStore(folder.parent, keep_last=1)._find_foreign())
    else:  # digits, but none that a run writes
        assert list_checkpoints(folder.parent) == []
    assert renamed.is_dir()
