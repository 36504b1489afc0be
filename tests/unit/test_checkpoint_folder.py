"""The folder of a run's checkpoints: links in it, what a user puts there, and steps that disappear while they are read."""

import json
import shutil
from pathlib import Path

import pytest
import torch.distributed as dist

from latte_flow.training.checkpoint import opening
from latte_flow.training.checkpoint.manifest import list_checkpoints, output_dir_of, step_name
from latte_flow.training.checkpoint.opening import find_checkpoint, load_pipeline
from latte_flow.training.checkpoint.store import CheckpointStore
from latte_flow.training.errors import UserError
from tests.unit.test_checkpoint_files import CONTENTS, problems, write_checkpoint


@pytest.fixture
def one_rank_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TestLinks:
    """``checkpoints/`` and the steps in it may be links, to another disk for example."""

    @pytest.fixture
    def elsewhere(self, tmp_path):
        """The folder that the checkpoints of the run tmp_path/run lie in."""
        write_checkpoint(tmp_path / "other", 1)
        folder = (tmp_path / "other" / "checkpoints").rename(tmp_path / "elsewhere")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "checkpoints").symlink_to(folder)
        return folder

    def test_checkpoints_on_another_disk_belong_to_the_run(self, tmp_path, elsewhere):
        named = tmp_path / "run" / "checkpoints" / step_name(1)
        assert find_checkpoint(tmp_path / "run") == named
        assert output_dir_of(named) == tmp_path / "run"
        (tmp_path / "best").symlink_to(named)
        (tmp_path / "run" / "best").symlink_to(Path("checkpoints") / named.name)
        for link in (tmp_path / "best", tmp_path / "run" / "best"):
            assert find_checkpoint(link) == link
            assert output_dir_of(link) == tmp_path / "run"

    def test_a_broken_link_is_no_empty_folder(self, tmp_path, elsewhere):
        elsewhere.rename(tmp_path / "unmounted")
        with pytest.raises(UserError, match=rf"{tmp_path}/run/checkpoints: links to {elsewhere}, which is not there"):
            find_checkpoint(tmp_path / "run")

    def test_a_step_that_is_a_link_is_read_and_retention_removes_the_link_alone(self, tmp_path):
        real = write_checkpoint(tmp_path / "archive", 1)
        store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
        store.folder.mkdir()
        (store.folder / real.name).symlink_to(real)
        assert find_checkpoint(tmp_path) == store.folder / real.name
        store.clean_up(write_checkpoint(tmp_path, 2))
        assert [path.name for path in store.folder.iterdir() if path.name != "latest"] == [step_name(2)]
        assert problems(real) == {}

    def test_a_step_whose_link_is_broken_is_damaged_and_replaced_by_the_next_save(self, tmp_path):
        store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
        write_checkpoint(tmp_path, 1)
        final = store.folder / step_name(2)
        final.symlink_to(tmp_path / "unmounted")
        assert list_checkpoints(store.folder)[-1] == final
        assert find_checkpoint(tmp_path).name == step_name(1)
        partial = write_checkpoint(tmp_path / "new", 2).rename(f"{final}.partial")
        store._commit(partial, final, json.loads((partial / "manifest.json").read_text()))
        assert not final.is_symlink()
        assert problems(final) == {}


def test_only_what_a_save_leaves_is_removed(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    newest = write_checkpoint(tmp_path, 7)
    left = [store.folder / "step_0000008.partial", store.folder / "latest.partial-node-1-77"]
    left[0].mkdir()
    left[1].write_text("step_00")
    (tmp_path / "archive").mkdir()
    own = [
        store.folder / name
        for name in (
            "notes.partial.txt",
            "step_0000003.partial.old",
            "my.partial",
            "step_3.partial",
            "x.partial-host-1",
        )
    ]
    for file in own[:2]:
        file.write_text("a user's own")
    for folder in own[2:]:
        folder.mkdir()
    own.append(store.folder / "step_0000009.partial")
    own[-1].symlink_to(tmp_path / "archive")
    store.clean_up(newest)
    assert set(store.folder.iterdir()) == {newest, store.folder / "latest", *own}


def test_a_name_that_a_save_needs_and_a_user_has_taken_is_a_failed_save(tmp_path, one_rank_group):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    store.folder.mkdir()
    taken = store.folder / "step_0000009.partial"
    taken.write_text("a user's own")
    assert f"{taken} is in the way" in store._prepare(store.folder / step_name(9), 0)
    assert store._prepare(store.folder / step_name(8), 0) is None


class TestRemovedWhileRead:
    """A run in progress saves the next checkpoint and removes the one that another program reads."""

    @pytest.fixture
    def when_read(self, monkeypatch):
        """Lets a function be called before the files of a checkpoint are read for the first time."""

        def install(name, action):
            read, waiting = getattr(opening, name), [action]

            def reading(*args, **kwargs):
                if waiting:
                    waiting.pop()()
                return read(*args, **kwargs)

            monkeypatch.setattr(opening, name, reading)

        return install

    def test_while_it_is_verified_the_newer_one_is_taken_and_no_older_one(self, tmp_path, when_read):
        write_checkpoint(tmp_path, 1)
        read = write_checkpoint(tmp_path, 2)
        when_read("check_files", lambda: (shutil.rmtree(read), write_checkpoint(tmp_path, 3)))
        assert find_checkpoint(tmp_path).name == step_name(3)

    def test_while_it_is_loaded_the_newer_one_is_taken(self, tmp_path, when_read, monkeypatch):
        read = write_checkpoint(tmp_path, 2)
        when_read("read_weights", lambda: (shutil.rmtree(read), write_checkpoint(tmp_path, 3)))
        monkeypatch.setattr(opening, "build_pipeline", lambda folder, state, *_: state)
        monkeypatch.setattr(opening, "ZeroShards", NamesOnly)
        assert load_pipeline(tmp_path, weights="model") == set(CONTENTS)

    def test_one_that_was_named_is_an_error(self, tmp_path, when_read, monkeypatch):
        read = write_checkpoint(tmp_path, 2)
        when_read("read_weights", lambda: (shutil.rmtree(read), write_checkpoint(tmp_path, 3)))
        monkeypatch.setattr(opening, "ZeroShards", NamesOnly)
        with pytest.raises(UserError, match=rf"{read}: was removed while it was read, .*; accepted: the output_dir"):
            load_pipeline(read, weights="model")

    def test_an_error_that_is_not_of_the_files_stays_what_it_is(self, tmp_path):
        write_checkpoint(tmp_path, 7)
        with pytest.raises(UserError, match="weights: 'both' is unknown"):
            load_pipeline(tmp_path, weights="both")


class NamesOnly:
    """Stands for the reader of shards, which these files are not."""

    def __init__(self, path):
        self._names = {file.name for file in path.iterdir()} - {"manifest.json"}

    def read_all(self):
        return self._names
