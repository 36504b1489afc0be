"""Training data: what a global sample index draws, how batches are dealt, and what is read from files."""

import dataclasses
from pathlib import Path

import datasets
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from latte_flow.model.randomness import Stream, uniform
from latte_flow.model.timestep_experts import TimestepExperts
from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.datasets import ImageDataset, load_image_dataset
from latte_flow.training.data.loader import MicroBatchSampler, make_loader
from latte_flow.training.data.sources.digits import digits_split
from latte_flow.training.distributed.batch_layout import BatchLayout
from latte_flow.training.errors import UserError
from latte_flow.training.objectives.flow_matching import FlowMatchingBatch, FlowMatchingSamples

EMOJI = Path(__file__).parents[3] / "shared" / "data" / "emoji64"
NUM_IMAGES, NUM_GROUPS, NULL_ROW = 23, 4, 3


def counting_images(length: int = NUM_IMAGES) -> ImageDataset:
    """Image i holds 10 i + (0 .. 3); its prompt is i mod 3."""
    return ImageDataset(
        name="counting",
        length=length,
        load=lambda i: 10.0 * i + torch.arange(4.0).view(1, 2, 2),
        prompt_rows=[i % 3 for i in range(length)],
        prompts=["a", "b", "c"],
        image_channels=1,
        class_names=None,
        fingerprint="",
    )


def make_samples(**changes) -> FlowMatchingSamples:
    fields = {
        "images": counting_images(),
        "experts": TimestepExperts(8, NUM_GROUPS),
        "latent_shape": (1, 2, 2),
        "seed": 5,
        "condition_drop": 0.3,
        "null_row": NULL_ROW,
        "horizontal_flip": True,
    }
    return FlowMatchingSamples(**(fields | changes))


def rows_of(batch: FlowMatchingBatch) -> dict[tuple[int, int], tuple]:
    """(global sample index, group) -> everything the row holds."""
    images = batch.images[batch.image_rows]
    keys = zip(batch.sample_indices.tolist(), batch.groups.tolist(), strict=True)
    columns = (images.flatten(1), batch.noise.flatten(1), batch.timesteps[:, None], batch.context_rows[:, None])
    values = [tuple(torch.cat([c.double() for c in row]).tolist()) for row in zip(*columns, strict=True)]
    rows = dict(zip(keys, values, strict=True))
    assert len(rows) == len(values)
    return rows


def trained_rows(samples, *, world_size, micro, total, first=0, last=2, num_workers=0) -> dict:
    """Everything that all ranks train on between two steps."""
    rows = {}
    for rank in range(world_size):
        layout = BatchLayout(total, micro, world_size, rank)
        loader = make_loader(samples, layout, first_step=first, last_step=last, num_workers=num_workers)
        assert len(loader) == (last - first) * total // (world_size * micro)
        for batch in loader:
            new = rows_of(batch)
            assert not rows.keys() & new.keys()  # no sample twice
            rows |= new
    return rows


class TestIndependenceOfTheLayout:
    @settings(max_examples=25)
    @given(
        world_size=st.integers(1, 4), micro=st.integers(1, 3), accumulation=st.integers(1, 3),
        groups_per_sample=st.sampled_from([1, "all"]),
    )  # fmt: skip
    def test_ranks_micro_batches_and_accumulation_train_the_same_rows(
        self, world_size, micro, accumulation, groups_per_sample
    ):
        samples = make_samples(groups_per_sample=groups_per_sample)
        total = world_size * micro * NUM_GROUPS * accumulation
        layout = BatchLayout(total, micro * NUM_GROUPS, world_size, 0)
        assert layout.accumulation_steps == accumulation
        spread = trained_rows(samples, world_size=world_size, micro=micro * NUM_GROUPS, total=total)
        whole = trained_rows(samples, world_size=1, micro=total, total=total)
        assert spread == whole
        factor = NUM_GROUPS if groups_per_sample == "all" else 1
        assert len(whole) == 2 * total * factor
        assert {index for index, _ in whole} == set(range(2 * total))

    @given(first=st.integers(0, 6), more=st.integers(0, 4))
    def test_resuming_at_any_step_trains_what_was_left(self, first, more):
        """With a new object, as after a restart."""
        last = first + more
        whole = trained_rows(make_samples(), world_size=1, micro=8, total=8, first=0, last=last)
        before = trained_rows(make_samples(), world_size=1, micro=8, total=8, first=0, last=first)
        after = trained_rows(make_samples(), world_size=2, micro=4, total=8, first=first, last=last)
        assert before | after == whole
        assert not before.keys() & after.keys()

    @pytest.mark.parametrize("world_size", [1, 2])
    def test_worker_processes_change_nothing(self, world_size):
        arguments = {"world_size": world_size, "micro": 4, "total": 8, "last": 3}
        assert trained_rows(make_samples(), **arguments, num_workers=2) == trained_rows(make_samples(), **arguments)

    def test_another_seed_draws_everything_anew(self):
        a, b = (trained_rows(make_samples(seed=s), world_size=1, micro=8, total=8) for s in (5, 6))
        assert a.keys() == b.keys()
        assert not set(a.values()) & set(b.values())

    def test_a_failing_image_raises_here(self, monkeypatch):
        images = dataclasses.replace(counting_images(), load=lambda i: torch.zeros(1, 2, 2) / [][i])
        loader = make_loader(
            make_samples(images=images), BatchLayout(4, 4, 1, 0), first_step=0, last_step=1, num_workers=1
        )
        batches = iter(loader)
        with pytest.raises(IndexError):
            next(batches)
        # torch waits 5 seconds for a failed worker, and as long again after a signal that this one ignores.
        monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
        batches._shutdown_workers()

    def test_layout_of_one_step_by_hand(self):
        """B = 16 on 2 ranks in micro-batches of 4: rank 0 has 0-3 and 8-11, rank 1 has 4-7 and 12-15, of step 2 from 32 on."""
        indices = [list(MicroBatchSampler(BatchLayout(16, 4, 2, rank), 2, 3)) for rank in (0, 1)]
        assert indices == [[[32, 33, 34, 35], [40, 41, 42, 43]], [[36, 37, 38, 39], [44, 45, 46, 47]]]


class TestOrder:
    @pytest.mark.slow
    @settings(max_examples=30)
    @given(epoch=st.integers(0, 1000), seed=st.integers(0, 2**64 - 1))
    def test_an_epoch_is_a_permutation_of_the_images(self, epoch, seed):
        samples = make_samples(seed=seed)
        order = [samples.data_index(epoch * NUM_IMAGES + i) for i in range(NUM_IMAGES)]
        assert sorted(order) == list(range(NUM_IMAGES))

    def test_epochs_have_different_orders(self):
        samples = make_samples()
        orders = {tuple(samples.data_index(e * NUM_IMAGES + i) for i in range(NUM_IMAGES)) for e in range(50)}
        assert len(orders) == 50

    def test_jumping_between_epochs_gives_the_same_order(self):
        """Ranks and workers meet the border of an epoch in any order."""
        samples = make_samples()
        straight = [samples.data_index(i) for i in range(3 * NUM_IMAGES)]
        jumps = np.random.default_rng(0).permutation(3 * NUM_IMAGES).tolist()
        assert [samples.data_index(i) for i in jumps] == [straight[i] for i in jumps]

    def test_fewer_images_than_a_batch(self):
        samples = make_samples(images=counting_images(3))
        assert len(trained_rows(samples, world_size=1, micro=8, total=8)) == 16


class TestStratifiedGroups:
    @pytest.mark.parametrize(("world_size", "micro"), [(1, 16), (2, 8), (4, 4)])
    def test_each_group_gets_an_equal_part_of_every_micro_batch(self, world_size, micro):
        for rank in range(world_size):
            layout = BatchLayout(16, micro, world_size, rank)
            for batch in make_loader(make_samples(), layout, first_step=0, last_step=3, num_workers=0):
                expected = np.repeat(np.arange(NUM_GROUPS), micro // NUM_GROUPS)
                np.testing.assert_array_equal(batch.groups, expected)  # in this order: equal parts by group

    @pytest.mark.parametrize("groups_per_sample", [1, "all"])
    def test_rows_are_ordered_by_group_then_sample(self, groups_per_sample):
        samples = make_samples(groups_per_sample=groups_per_sample)
        (batch,) = make_loader(samples, BatchLayout(8, 8, 1, 0), first_step=1, last_step=2, num_workers=0)
        keys = list(zip(batch.groups.tolist(), batch.sample_indices.tolist(), strict=True))
        assert keys == sorted(keys)
        if groups_per_sample == "all":
            assert keys == [(g, i) for g in range(NUM_GROUPS) for i in range(8, 16)]

    def test_all_groups_see_the_sample_and_its_noise_at_their_own_timestep(self):
        samples = make_samples(groups_per_sample="all")
        (batch,) = make_loader(samples, BatchLayout(8, 8, 1, 0), first_step=0, last_step=1, num_workers=0)
        assert batch.images.shape == (8, 1, 2, 2)  # each image once, encoded once
        for index in range(8):
            rows = batch.sample_indices == index
            assert rows.sum() == NUM_GROUPS
            assert len(batch.image_rows[rows].unique()) == len(batch.context_rows[rows].unique()) == 1
            assert len(batch.noise[rows].unique(dim=0)) == 1
            assert len(batch.timesteps[rows].unique()) == NUM_GROUPS

    def test_a_sample_draws_the_same_timestep_with_one_group_or_all(self):
        one, every = (
            trained_rows(make_samples(groups_per_sample=g), world_size=1, micro=8, total=8) for g in (1, "all")
        )
        assert one.items() <= every.items()

    @pytest.mark.parametrize("group", range(NUM_GROUPS))
    def test_timesteps_are_uniform_in_the_groups_training_interval(self, group):
        """The paper's intervals: [1000, 700.25], [800.25, 450.5], [550.5, 200.75], [300.75, 0]."""
        high, low = [(1000, 700.25), (800.25, 450.5), (550.5, 200.75), (300.75, 0)][group]
        samples = make_samples()
        taus = [samples[i]["timesteps"].item() for i in range(group, 6000, NUM_GROUPS)]
        assert scipy.stats.kstest(taus, scipy.stats.uniform(low, high - low).cdf).pvalue > 0.01


class TestDraws:
    def test_fraction_of_null_prompts(self):
        samples = make_samples(condition_drop=0.1)
        dropped = [samples[i]["context_row"] == NULL_ROW for i in range(4000)]
        assert scipy.stats.binomtest(sum(dropped), 4000, 0.1).pvalue > 0.01

    def test_no_drop_keeps_every_images_own_prompt(self):
        samples = make_samples(condition_drop=0.0)
        assert [samples[i]["context_row"] for i in range(200)] == [samples.data_index(i) % 3 for i in range(200)]

    def test_a_drop_does_not_depend_on_the_group(self):
        """Chi-square over groups: a drop that follows index mod K would starve a group of the null prompt."""
        samples = make_samples(condition_drop=0.5)
        table = np.zeros((NUM_GROUPS, 2))
        for i in range(4000):
            table[i % NUM_GROUPS, int(samples[i]["context_row"] == NULL_ROW)] += 1
        assert scipy.stats.chi2_contingency(table).pvalue > 0.01

    def test_half_of_the_images_are_mirrored_left_to_right(self):
        samples, plain = make_samples(), counting_images()
        mirrored = 0
        for i in range(3000):
            image, original = samples[i]["image"], plain[samples.data_index(i)][0]
            is_mirrored = torch.equal(image, original[..., [1, 0]])
            assert is_mirrored or torch.equal(image, original)
            mirrored += is_mirrored
        assert scipy.stats.binomtest(mirrored, 3000, 0.5).pvalue > 0.01

    def test_no_flips_unless_asked_for(self):
        samples = make_samples(horizontal_flip=False)
        assert all(torch.equal(samples[i]["image"], counting_images()[samples.data_index(i)][0]) for i in range(100))

    def test_noise_is_standard_normal_and_each_samples_own(self):
        samples = make_samples(latent_shape=(2, 3, 3))
        noise = torch.stack([samples[i]["noise"] for i in range(500)])
        assert noise.dtype == torch.float32
        assert scipy.stats.kstest(noise.numpy().ravel(), "norm").pvalue > 0.01
        assert len(noise.flatten().unique()) > 0.999 * noise.numel()

    def test_draws_of_different_purposes_are_independent(self):
        """Drop, flip and timestep of a sample come from streams of their own."""
        samples = make_samples(condition_drop=0.5)
        columns = np.array([
            [uniform(5, Stream.FLIP, i) < 0.5, samples[i]["context_row"] == NULL_ROW, samples[i]["noise"][0, 0, 0]]
            for i in range(3000)
        ], dtype=float)  # fmt: skip
        assert np.abs(np.corrcoef(columns.T)[np.triu_indices(3, 1)]).max() < 0.06


class TestDigits:
    CONFIG = DataConfig(dataset="digits", resolution=8, prompt_template="the digit {}")

    def test_are_scikit_learns_in_minus_one_to_one(self):
        dataset, digits = load_image_dataset(self.CONFIG), load_digits()
        train, _ = digits_split()
        assert len(dataset) == len(train) == 1257
        for i in (0, 500, 1256):
            image, row = dataset[i]
            assert image.shape == (1, 8, 8)
            np.testing.assert_allclose((image[0].numpy() + 1) * 8, digits.images[train[i]], atol=1e-5)
            assert row == digits.target[train[i]]
        names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        assert dataset.prompts == [f"the digit {name}" for name in names]

    def test_training_and_held_out_digits_are_all_of_them_once(self):
        train, held_out = digits_split()
        assert sorted([*train, *held_out]) == list(range(1797))
        assert np.bincount(load_digits().target[train], minlength=10).min() > 90  # no digit is missing

    @pytest.mark.parametrize("resolution", [7, 16, 256])
    def test_another_resolution_is_refused(self, resolution):
        with pytest.raises(UserError, match=rf"data.resolution: {resolution}; accepted with data.dataset digits: 8"):
            load_image_dataset(dataclasses.replace(self.CONFIG, resolution=resolution))


@pytest.fixture(autouse=True)
def datasets_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def pictures(count: int, size: int = 6, mode: str = "RGB") -> list[Image.Image]:
    rng = np.random.default_rng(0)
    shape = (size, size) if mode == "L" else (size, size, len(mode))
    return [Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8), mode) for _ in range(count)]


def write_parquet(path: Path, columns: dict, features: dict | None = None) -> Path:
    features = datasets.Features({"image": datasets.Image(), **(features or {"text": datasets.Value("string")})})
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


def parquet_config(path: Path | str | None, **changes) -> DataConfig:
    fields = {"dataset": "parquet", "resolution": 6, "prompt_template": "a {}!"}
    return DataConfig(path=None if path is None else str(path), **(fields | changes))


class TestParquet:
    TEXTS = ("cat", "dog", "cat", "cow")

    def test_images_are_what_was_written(self, tmp_path):
        images = pictures(4)
        file = write_parquet(tmp_path / "a.parquet", {"image": images, "text": self.TEXTS})
        dataset = load_image_dataset(parquet_config(file))
        assert len(dataset) == 4
        assert (dataset.image_channels, dataset.class_names) == (3, None)
        for i, picture in enumerate(images):
            image, row = dataset[i]
            assert image.dtype == torch.float32
            np.testing.assert_allclose((image.numpy() + 1) * 127.5, np.asarray(picture).transpose(2, 0, 1), atol=1e-3)
            assert dataset.prompts[row] == f"a {self.TEXTS[i]}!"
        assert list(dataset.prompts) == ["a cat!", "a dog!", "a cow!"]  # each once

    def test_class_labels_are_prompts_in_their_own_order(self, tmp_path):
        labels = datasets.ClassLabel(names=["zebra", "ape", "never seen"])
        file = write_parquet(tmp_path / "a.parquet", {"image": pictures(3), "kind": [1, 0, 1]}, {"kind": labels})
        dataset = load_image_dataset(parquet_config(file, text_column="kind"))
        assert dataset.class_names == ["zebra", "ape", "never seen"]
        assert dataset.prompts == ["a zebra!", "a ape!", "a never seen!"]
        assert [dataset[i][1] for i in range(3)] == [1, 0, 1]

    def test_a_folder_is_all_its_files_in_order(self, tmp_path):
        images = pictures(4)
        (tmp_path / "deep").mkdir()
        for name, part in (("b.parquet", slice(0, 2)), ("deep/c.parquet", slice(2, 3)), ("a.parquet", slice(3, 4))):
            write_parquet(tmp_path / name, {"image": images[part], "text": self.TEXTS[part]})
        dataset = load_image_dataset(parquet_config(tmp_path))
        assert [dataset.prompts[row] for _, row in (dataset[i] for i in range(4))] == [
            "a cow!", "a cat!", "a dog!", "a cat!"
        ]  # fmt: skip

    @pytest.mark.parametrize("mode", ["L", "RGBA"])
    def test_any_kind_of_picture_becomes_colour(self, tmp_path, mode):
        images = pictures(1, mode=mode)
        dataset = load_image_dataset(
            parquet_config(write_parquet(tmp_path / "a.parquet", {"image": images, "text": ["x"]}))
        )
        expected = np.asarray(images[0].convert("RGB")).transpose(2, 0, 1)
        np.testing.assert_allclose((dataset[0][0].numpy() + 1) * 127.5, expected, atol=1e-3)

    def test_pictures_of_another_size_are_scaled(self, tmp_path):
        """A plain colour stays that colour; a half-black picture stays half black."""
        half = Image.new("RGB", (12, 12))
        half.paste((255, 255, 255), (0, 0, 6, 12))
        images = [Image.new("RGB", (24, 24), (255, 0, 51)), half]
        dataset = load_image_dataset(
            parquet_config(write_parquet(tmp_path / "a.parquet", {"image": images, "text": ["x", "y"]}))
        )
        plain, half = dataset[0][0], dataset[1][0]
        assert plain.shape == half.shape == (3, 6, 6)
        torch.testing.assert_close(plain.mean((1, 2)), torch.tensor([1.0, -1.0, -0.6]), rtol=0, atol=1e-3)
        assert (half[..., :2] > 0.9).all()
        assert (half[..., 4:] < -0.9).all()

    def test_fingerprint_changes_with_the_data(self, tmp_path):
        first, second = pictures(2), pictures(3)[1:]
        prints = []
        for images in (first, first, second):
            file = write_parquet(tmp_path / "a.parquet", {"image": images, "text": ["x", "y"]})
            prints.append(load_image_dataset(parquet_config(file)).fingerprint)
        assert prints[0] != prints[2]

    def test_survives_worker_processes(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", {"image": pictures(4), "text": self.TEXTS})
        samples = make_samples(images=load_image_dataset(parquet_config(file)), latent_shape=(3, 6, 6))
        arguments = {"world_size": 1, "micro": 4, "total": 4, "last": 3}
        assert trained_rows(samples, **arguments, num_workers=2) == trained_rows(samples, **arguments)


class TestParquetErrors:
    @pytest.mark.parametrize("path", [None, "/nowhere/data.parquet"])
    def test_a_missing_path(self, path):
        with pytest.raises(UserError, match=rf"data.path: {path} not found; accepted: a Parquet file, or a folder"):
            load_image_dataset(parquet_config(path))

    def test_a_folder_without_parquet_files(self, tmp_path):
        (tmp_path / "notes.txt").write_text("nothing")
        with pytest.raises(UserError, match=rf"data.path: {tmp_path} holds no \*.parquet file"):
            load_image_dataset(parquet_config(tmp_path))

    @pytest.mark.parametrize(("field", "column"), [("image_column", "picture"), ("text_column", "caption")])
    def test_a_missing_column_names_those_there(self, tmp_path, field, column):
        file = write_parquet(tmp_path / "a.parquet", {"image": pictures(1), "text": ["x"]})
        with pytest.raises(UserError, match=rf"data.{field}: '{column}' is not in .*accepted: image, text"):
            load_image_dataset(parquet_config(file, **{field: column}))

    def test_zero_images(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", {"image": [], "text": []})
        with pytest.raises(UserError, match=r"data.path: .* holds zero images"):
            load_image_dataset(parquet_config(file))

    @pytest.mark.parametrize("content", [b"", b"PAR1 this is no table PAR1", b"PAR1"])
    def test_a_file_that_is_no_parquet(self, tmp_path, content):
        file = tmp_path / "a.parquet"
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"data.path: .*{tmp_path}"):
            load_image_dataset(parquet_config(file))

    def test_a_truncated_file(self, tmp_path):
        file = write_parquet(tmp_path / "a.parquet", {"image": pictures(4), "text": TestParquet.TEXTS})
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(UserError, match=rf"data.path: .*{tmp_path}"):
            load_image_dataset(parquet_config(file))

    @pytest.mark.parametrize("column", ["text", "number", "nothing"])
    def test_an_image_column_without_images(self, tmp_path, column):
        columns = {"image": pictures(1), "text": ["x"], "number": [3], "nothing": [None]}
        features = {
            "text": datasets.Value("string"),
            "number": datasets.Value("int64"),
            "nothing": datasets.Value("binary"),
        }
        file = write_parquet(tmp_path / "a.parquet", columns, features)
        with pytest.raises(UserError, match=rf"data.image_column: '{column}' of .* does not hold images"):
            load_image_dataset(parquet_config(file, image_column=column))

    def test_files_of_different_columns(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", {"image": pictures(1), "text": ["x"]})
        write_parquet(tmp_path / "b.parquet", {"image": pictures(1), "z": ["x"]}, {"z": datasets.Value("string")})
        with pytest.raises(UserError, match=rf"data.path: .*{tmp_path}"):
            load_image_dataset(parquet_config(tmp_path))


@pytest.mark.skipif(not EMOJI.is_dir(), reason=f"needs the emoji data set at {EMOJI}")
class TestEmoji:
    def test_captions(self):
        dataset = load_image_dataset(parquet_config(EMOJI / "train.parquet", resolution=64))
        assert len(dataset) == 3121  # its README
        assert dataset[0][0].shape == (3, 64, 64)
        pixels = torch.stack([dataset[i][0] for i in range(0, 3121, 300)])
        assert pixels.min() >= -1
        assert pixels.max() == 1
        assert (pixels[:, :, 0, 0] == 1).float().mean() > 0.9  # on white
        assert len(dataset.prompts) == len(set(dataset.prompts)) > 2000

    def test_categories(self):
        dataset = load_image_dataset(parquet_config(EMOJI / "validation.parquet", resolution=64, text_column="label"))
        assert len(dataset) == 479
        assert len(dataset.class_names) == 9
        table = datasets.load_dataset("parquet", data_files=str(EMOJI / "validation.parquet"), split="train")
        assert list(dataset.prompt_rows) == table["label"][:]


def test_shapes_and_types_of_a_batch():
    """With 4 samples, each in all 4 groups."""
    samples = make_samples(groups_per_sample="all")
    (batch,) = make_loader(samples, BatchLayout(4, 4, 1, 0), first_step=0, last_step=1, num_workers=0)
    shapes = {
        name: [str(x.dtype).removeprefix("torch."), list(x.shape)] for name, x in vars(batch).items() if x is not None
    }
    assert shapes == {
        "images": ["float32", [4, 1, 2, 2]],
        "image_rows": ["int64", [16]],
        "noise": ["float32", [16, 1, 2, 2]],
        "timesteps": ["float32", [16]],
        "groups": ["int64", [16]],
        "context_rows": ["int64", [16]],
        "sample_indices": ["int64", [16]],
    }
