"""Encode images to latents once, so that training does not have to.

    python tools/encode_latents.py --source PATH --output DIR [--codec PATH|PRESET|pixel] [--resolution 256] [--batch_size N]

--source is a folder of images (one folder per class), Parquet files, WebDataset tars, a saved data set, or digits; with --dataset
hf, whatever datasets.load_dataset loads. DIR becomes a data set that training reads (data.dataset latents, data.path DIR) and
datasets.load_from_disk opens; see training/data/latents/.

Under torchrun, deepspeed or srun with RANK and WORLD_SIZE set, rank r encodes the shards r, r + W, r + 2 W, ...; the result is
the same with any number of ranks. After a kill, the same command resumes; finished shards are not encoded again.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from latte_flow.model.codecs import CODECS, PRESETS, LatentCodec, load_codec
from latte_flow.tools.command_line import check_paths, check_positive, find_device, run_function
from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.data.images import ImageDataset
from latte_flow.training.data.latents.dataset import FORMAT, latent_columns
from latte_flow.training.data.latents.writer import LatentWriter
from latte_flow.training.data.sources import SOURCES, detect_dataset, find_source
from latte_flow.training.distributed.ranks import launched_ranks
from latte_flow.training.errors import UserError, naming
from latte_flow.training.monitor.progress import hide_library_bars, progress_bar

DEFAULT_PRESET = "dc-ae-f32c32-in-1.0"
POLL_SECONDS = 0.2


def encode_latents(
    *,
    source: str,
    output: str,
    codec: str = DEFAULT_PRESET,
    scaling_factor: float | None = None,
    codec_path: str | None = None,
    patch: int = 1,
    dataset: str | None = None,
    split: str = "train",
    subset: str | None = None,
    image_column: str = "auto",
    text_column: str = "auto",
    class_names: str | None = None,
    max_broken_fraction: float = 0.001,
    resolution: int = 256,
    batch_size: int = 64,
    num_workers: int = 4,
    flip: bool = True,
    shard_size: int = 4096,
    precision: Literal["bf16", "fp32"] = "bf16",
    device: str | None = None,
    wait_minutes: float = 60.0,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Encode images into latents for training.

    Args:
        source: images: a folder or file; the name of a data set on the hub, with dataset hf; or digits
        output: output folder; one that is incomplete is resumed
        codec: folder or hub id of an AutoencoderDC; dc-ae-f32c32-in-1.0, dc-ae-f32c32-sana-1.0; pixel; or one that was registered
        scaling_factor: checked against the checkpoint's
        codec_path: folder or hub id, for a registered codec that has a checkpoint
        patch: side of a latent position in pixels, for pixel
        dataset: kind of data, as data.dataset; default: detected from the source
        split: split to encode, for hf
        subset: configuration of the data set, for hf
        image_column: column of images; auto: 'image', or the only one
        text_column: column of captions or classes; auto: text, caption, txt, label or cls
        class_names: class names: imagenet-1k or a file; see data.class_names
        max_broken_fraction: largest accepted fraction of broken images
        resolution: side of the square images in pixels
        batch_size: images encoded at once per rank
        num_workers: processes per rank that read images
        flip: also encode the mirrored images; without them the output has half the size: train with horizontal_flip false
        shard_size: images per file; a kill loses at most this many per rank
        precision: of the autoencoder
        device: cpu or cuda; default: cuda if available
        wait_minutes: how long rank 0 waits for a shard of another rank
        rank: which part of the data set to encode
        world_size: number of parts

    Raises:
        UserError: when an argument, the source or the codec is invalid, the output holds something else, more images are broken
            than accepted, or (rank 0) another rank has stopped.
    """
    check_paths(source=source, output=output, codec=codec, codec_path=codec_path)
    check_positive(resolution=resolution, batch_size=batch_size, shard_size=shard_size, patch=patch)
    if num_workers < 0:
        raise UserError(f"num_workers: got {num_workers}; accepted: 0 or more")
    if not 0 <= max_broken_fraction < 1:
        raise UserError(f"max_broken_fraction: got {max_broken_fraction}; accepted: 0 to less than 1")
    device = find_device(device)
    hide_library_bars()
    path = None if source in SOURCES else source
    dataset = dataset or (source if path is None else detect_dataset(Path(source)))
    if find_source(dataset).encoded:
        raise UserError(f"dataset: {dataset}; accepted: a data set of images")
    images = load_image_dataset(
        DataConfig(
            dataset=dataset,
            path=path,
            split=split,
            subset=subset,
            image_column=image_column,
            text_column=text_column,
            class_names=class_names,
            max_broken_fraction=max_broken_fraction,
            resolution=resolution,
        )
    )
    kind, codec_path = (codec, codec_path) if codec in CODECS else ("dc-ae", codec)
    encoder = _load_encoder(
        kind,
        codec_path,
        scaling_factor,
        patch,
        image_channels=images.image_channels,
        resolution=resolution,
        precision=precision,
    )
    origin = {
        "dataset": dataset,
        "path": str(Path(path).absolute()) if path is not None and Path(path).exists() else path,
        "fingerprint": images.fingerprint,
        "image_column": image_column,
        "text_column": text_column,
    }
    settings = _settings(
        images,
        origin,
        encoder,
        kind,
        codec_path,
        precision=precision,
        resolution=resolution,
        flips=flip,
        shard_size=shard_size,
    )
    writer = LatentWriter(Path(output), settings)
    if writer.is_finished:
        if rank == 0:
            print(f"{output} is complete: {len(images)} images")
        return
    with progress_bar(total=len(images), unit="image", desc="encoding", disable=rank != 0, mininterval=1.0) as progress:
        _update(progress, writer)
        progress.initial = progress.n  # so that the rate counts only this start
        mine = [shard for shard in range(rank, writer.num_shards, world_size) if not writer.is_complete(shard)]
        _encode(writer, mine, images, encoder.to(device), batch_size, num_workers, progress)
        if rank != 0:
            return
        _wait_for_other_ranks(writer, progress, wait_minutes)
    _report(writer.finish(images.max_broken), output)


def _settings(
    images: ImageDataset,
    origin: dict,
    encoder: LatentCodec,
    kind: str,
    codec_path: str | None,
    *,
    precision: str,
    resolution: int,
    flips: bool,
    shard_size: int,
) -> dict:
    """Return all that determines the result, as LatentWriter takes it."""
    return {
        "format": FORMAT,
        "source": origin,
        "codec": {
            "kind": kind,
            "path": codec_path,
            "fingerprint": encoder.fingerprint(),
            "scaling_factor": encoder.scaling_factor,
            "image_channels": encoder.image_channels,
            "precision": precision if encoder.has_weights else None,
        },
        "resolution": resolution,
        "latent_shape": [encoder.latent_channels, *encoder.latent_size(resolution)],
        "dtype": "bfloat16",
        "flips": flips,
        "num_images": len(images),
        "shard_size": shard_size,
        "class_names": images.class_names,
    }


def _report(manifest: dict, output: str) -> None:
    """Print what was written, and its warnings."""
    statistics = manifest["statistics"]
    print(
        f"{manifest['num_images']} images ({manifest['num_broken']} broken) in {output}: latents "
        f"{tuple(manifest['latent_shape'])}, mean {statistics['mean']:.4f}, standard deviation {statistics['std']:.4f}"
    )
    for warning in manifest["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def _load_encoder(
    kind: str,
    path: str | None,
    scaling_factor: float | None,
    patch: int,
    *,
    image_channels: int,
    resolution: int,
    precision: str,
) -> LatentCodec:
    """Load the codec and check that it accepts these images.

    Raises:
        UserError: when it cannot be loaded or does not accept them.
    """
    with naming("codec."):
        encoder = load_codec(
            kind,
            path=None if path in PRESETS else path,
            preset=path if path in PRESETS else None,
            scaling_factor=scaling_factor,
            image_channels=image_channels,
            patch=patch,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        )
    with naming():
        encoder.latent_size(resolution)
    if encoder.image_channels != image_channels:
        raise UserError(
            f"codec: takes {encoder.image_channels} image channels, the images have {image_channels}; accepted: the same"
        )
    return encoder


class _Fetched(Dataset):
    """index -> (index, image, index of the image actually used)."""

    def __init__(self, images: ImageDataset):
        self.images = images

    def __getitem__(self, index: int):
        return index, *self.images.fetch(index)


def _encode(
    writer: LatentWriter,
    shards: list[int],
    images: ImageDataset,
    codec: LatentCodec,
    batch_size: int,
    num_workers: int,
    progress: tqdm,
) -> None:
    """Encode and write shards: latents [n, C, H, W] in bfloat16 by column, and the source image of each row.

    No batch spans two shards, so an image is in the same batch however the shards are distributed over ranks.
    """
    batches = [
        list(rows[first : first + batch_size])
        for rows in map(writer.rows, shards)
        for first in range(0, len(rows), batch_size)
    ]
    device = next((p.device for p in codec.parameters()), torch.device("cpu"))
    loader = DataLoader(
        _Fetched(images), batch_sampler=batches, num_workers=num_workers, pin_memory=device.type == "cuda"
    )
    fetched = iter(loader)
    columns = latent_columns(writer.settings["flips"])
    for shard in shards:
        parts, sources = {name: [] for name in columns}, []
        while len(sources) < len(writer.rows(shard)):
            indices, pixels, used = next(fetched)
            pixels = pixels.to(device, non_blocking=True)
            with torch.no_grad():
                for name in columns:
                    latents = codec.encode(pixels.flip(-1) if name == "latent_flipped" else pixels)
                    parts[name].append(latents.to(torch.bfloat16).cpu())
            sources += used.tolist()
            progress.update(len(indices))
        rows = [int(images.prompt_rows[i]) for i in sources]
        conditions = rows if images.class_names is not None else [images.captions[row] for row in rows]
        broken = [i for i, used in zip(writer.rows(shard), sources, strict=True) if i != used]
        shard_latents = {name: torch.cat(part) for name, part in parts.items()}
        writer.write_shard(shard, shard_latents, conditions, sources, {i: images.reason_broken(i) for i in broken})
        _update(progress, writer)


def _update(progress: tqdm, writer: LatentWriter) -> int:
    """Show the images of all complete shards of all ranks in the progress bar; return the number of these shards."""
    complete = [shard for shard in range(writer.num_shards) if writer.is_complete(shard)]
    progress.n = sum(len(writer.rows(shard)) for shard in complete)
    progress.refresh()
    return len(complete)


def _wait_for_other_ranks(writer: LatentWriter, progress: tqdm, minutes: float) -> None:
    """Wait until every shard exists. Polls the files, so the ranks need no process group and may even run one after another."""
    complete, since = _update(progress, writer), time.monotonic()
    while complete < writer.num_shards:
        if time.monotonic() - since > 60 * minutes:
            raise UserError(
                f"wait_minutes: {writer.num_shards - complete} shards of other ranks are missing, and none was finished in "
                f"{minutes:g} minutes; accepted: the same command again, which encodes them"
            )
        time.sleep(POLL_SECONDS)
        before, complete = complete, _update(progress, writer)
        since = time.monotonic() if complete > before else since


def run() -> int:
    """Run the command line and return its exit code (console script)."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return run_function(encode_latents, lambda: dict(zip(("rank", "world_size"), launched_ranks(), strict=True)))


if __name__ == "__main__":
    sys.exit(run())
