"""Every file of a real checkpoint, damaged in turn: found, named, and the checkpoint before it taken instead."""

import contextlib
import json
import os
import shutil

import pytest
import torch
import torch.distributed as dist

from latte_flow.tools.sample import sample
from latte_flow.training.checkpoint.manifest import read_manifest
from latte_flow.training.checkpoint.opening import find_checkpoint, load_pipeline, read_weights
from latte_flow.training.checkpoint.store import CheckpointStore
from latte_flow.training.errors import UserError

FILES = (
    "manifest.json",
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "zero_pp_rank_1_mp_rank_00_optim_states.pt",
)
OLDER, NEWEST = "step_0000004", "step_0000008"


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


DAMAGES = {
    "cut off by a byte": lambda content: content[:-1],
    "cut off to nothing": lambda content: b"",
    "a bit flipped": lambda content: flipped(content, 4 * len(content)),
    "removed": lambda content: None,
}


def damage(file, how) -> None:
    """Damage one file; the run that it is linked from keeps its own."""
    content = how(file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)


@pytest.fixture
def run(two_ranks, tmp_path):
    """The output_dir of eight steps on two ranks, to be damaged: links to its files."""
    folder = tmp_path / "run"
    shutil.copytree(two_ranks.output_dir, folder, copy_function=os.link)
    return folder


@pytest.fixture(scope="module")
def _one_process(tmp_path_factory):
    """A process group of this process alone, for the store's collectives."""
    file = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(file), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def store(run, _one_process):
    return CheckpointStore(run / "checkpoints", keep_last=3)


def test_these_are_all_files_of_a_checkpoint(run, store):
    for name in (OLDER, NEWEST):
        assert sorted(path.name for path in (run / "checkpoints" / name).iterdir()) == sorted(FILES)
    assert store.newest_valid() == find_checkpoint(run) == run / "checkpoints" / NEWEST


@pytest.mark.parametrize("how", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_taken(run, store, capsys, caplog, file, how):
    older, newest = (run / "checkpoints" / name for name in (OLDER, NEWEST))
    damage(newest / file, how)
    assert store.newest_valid() == older
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"checkpoint {newest} skipped: {file} ")

    assert find_checkpoint(run) == older
    assert f"{newest} skipped: {file} " in caplog.text
    with pytest.raises(UserError, match=rf"{newest}: damaged: {file} "):
        find_checkpoint(newest)

    damage(older / file, how)
    with pytest.raises(UserError, match=r"all 2 checkpoints are damaged; none can be resumed"):
        store.newest_valid()
    for line, path in zip(capsys.readouterr().out.splitlines(), (newest, older), strict=True):
        assert line.startswith(f"checkpoint {path} skipped: {file} ")
    with pytest.raises(UserError, match=rf"{run}: holds no valid checkpoint"):
        find_checkpoint(run)


@pytest.mark.parametrize("file", FILES)
def test_images_are_drawn_from_the_checkpoint_before_a_damaged_one(run, tmp_path, file):
    older, newest = (run / "checkpoints" / name for name in (OLDER, NEWEST))
    damage(newest / file, DAMAGES["a bit flipped"])
    expected = read_weights(older, "ema")
    drawn = load_pipeline(run).model.state_dict()
    assert all(torch.equal(drawn[name], tensor) for name, tensor in expected.items())
    assert expected.keys() <= drawn.keys()
    with pytest.raises(UserError, match=rf"{newest}: damaged: {file} "):
        sample(str(newest), output=str(tmp_path / "drawn"))
    damage(older / file, DAMAGES["a bit flipped"])
    with pytest.raises(UserError, match=rf"{run}: holds no valid checkpoint"):
        sample(str(run), output=str(tmp_path / "drawn"))
    assert not (tmp_path / "drawn").exists()


def said_by(folder) -> dict | None:
    """What a manifest says, its own digest aside; None when it is damaged."""
    with contextlib.suppress(UserError):
        return {name: value for name, value in read_manifest(folder).items() if name != "sha256"}


def test_a_flipped_bit_in_any_byte_of_a_real_manifest_is_found(run):
    """Every third bit of it, but for the name of its own digest: without that it is of an older version and says the same."""
    path = run / "checkpoints" / NEWEST / "manifest.json"
    whole, said = path.read_bytes(), said_by(path.parent)
    path.unlink()  # a link
    harmless = set()
    for bit in range(0, 8 * len(whole), 3):
        path.write_bytes(flipped(whole, bit))
        read = said_by(path.parent)
        if read is not None:
            assert said.items() <= read.items()
            harmless.add(bit // 8)
    name = whole.rindex(b'"sha256"') + 1
    assert harmless <= set(range(name, name + len("sha256")))


def test_a_manifest_of_an_older_version_is_read(run, store):
    path = run / "checkpoints" / NEWEST / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    path.unlink()
    path.write_text(json.dumps(manifest))
    assert store.newest_valid() == path.parent


def test_a_file_that_the_disk_cannot_give_back_is_named(run, store, capsys):
    """Reading this file of the kernel at its start is an I/O error."""
    file = run / "checkpoints" / NEWEST / FILES[1]
    file.unlink()
    file.symlink_to("/proc/self/mem")
    manifest = json.loads((file.parent / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"][file.name]["bytes"] = 0  # what it seems to have
    (file.parent / "manifest.json").unlink()
    (file.parent / "manifest.json").write_text(json.dumps(manifest))
    assert store.newest_valid() == run / "checkpoints" / OLDER
    assert f"{file.name} cannot be read: Input/output error" in capsys.readouterr().out
