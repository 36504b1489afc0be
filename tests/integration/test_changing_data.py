"""Data that are damaged or changed, before a run, in the middle of it, and between its parts."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from latte_flow.tools.encode_latents import encode_latents
from latte_flow.training.checkpoint.opening import find_checkpoint
from tests.integration.launching import column
from tests.integration.test_bad_input import assert_refused

SMALL = {"sample__every": 0, "checkpoint__every": 2}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The digits as latents, in three files."""
    folder = tmp_path_factory.mktemp("latents") / "digits"
    settings = {"codec": "pixel", "resolution": 8, "shard_size": 500, "num_workers": 0, "device": "cpu", "flip": False}
    encode_latents(source="digits", output=str(folder), **settings)
    return folder


@pytest.fixture
def latents(original, tmp_path):
    return shutil.copytree(original, tmp_path / "latents")


def test_a_flipped_bit_in_latents_ends_a_run_on_all_ranks_before_it_writes_anything(command, latents, tmp_path):
    file = latents / "data-00001-of-00003.arrow"  # in the second rank's share
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    fields = {"data__dataset": "latents", "data__path": latents, "output_dir": tmp_path / "run"}
    run = command.train(ranks=2, max_steps=2, code=2, **fields, **SMALL)
    assert_refused(run.finished, "data.path", str(file), "another SHA-256", "delete it")
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_cut_off_while_a_data_worker_reads_it_is_one_line(command, latents):
    file = latents / "data-00000-of-00003.arrow"
    fields = {"data__dataset": "latents", "data__path": latents, "data__num_workers": 1}
    run = command.train(code=2, hooks=("cut_off_a_file",), variables={"CUT_OFF": f"2 {file}"}, **fields, **SMALL)
    assert_refused(run.finished, "data.path", str(file), "was truncated while in use", "last checkpoint")
    assert find_checkpoint(run.output_dir) >= run.checkpoint(2)  # there is one to go on from


def test_a_run_goes_on_with_changed_data_only_when_it_is_allowed(command, tmp_path):
    def write(number):
        folder = tmp_path / "images" / ("a", "b")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")

    for number in range(40):
        write(number)
    fields = {"data__dataset": "imagefolder", "data__path": tmp_path / "images", **SMALL}
    run = command.train(max_steps=2, **fields)
    recorded = json.loads((run.output_dir / "data.json").read_text())
    assert (recorded["length"], "before" in recorded) == (40, False)

    write(40)
    refused = command.train(max_steps=4, output_dir=run.output_dir, code=2, **fields)
    assert_refused(refused.finished, "data.path", "has changed since this run was started", "--data.allow_changed true")
    assert json.loads((run.output_dir / "data.json").read_text()) == recorded

    allowed = command.train(max_steps=4, output_dir=run.output_dir, data__allow_changed="true", **fields)
    assert "the run continues with the changed data" in allowed.finished.output
    assert column(run.output_dir, "step") == [1, 2, 3, 4]
    now = json.loads((run.output_dir / "data.json").read_text())
    assert now["length"] == 41
    assert now["before"] == [recorded | {"until_step": 2}]


def test_a_run_whose_own_files_have_changed_is_refused_and_one_without_their_record_is_not(command, tmp_path):
    run = command.train(ranks=2, max_steps=2, **SMALL)
    record, pipeline = run.output_dir / "data.json", run.output_dir / "model" / "pipeline.json"
    recorded, names = json.loads(record.read_text()), pipeline.read_text()
    pipeline.write_text(names.replace('"three"', '"eight"'))
    refused = command.train(ranks=2, max_steps=4, output_dir=run.output_dir, code=2, **SMALL)
    assert_refused(refused.finished, "model/pipeline.json", "has changed since this run was started", "as they were")

    pipeline.write_text(names)
    older = {name: recorded[name] for name in ("name", "length", "fingerprint")}
    record.write_text(json.dumps(older))
    command.train(max_steps=4, output_dir=run.output_dir, **SMALL)  # on another number of ranks, too
    assert column(run.output_dir, "step") == [1, 2, 3, 4]
    assert json.loads(record.read_text()) == recorded

    fields = {"resume": run.output_dir, "data__prompt_template": "The digit {}."}
    new = command.train(max_steps=6, output_dir=tmp_path / "new", **fields, **SMALL)
    assert "the prompts of digits have changed since that run was started" in new.finished.output
