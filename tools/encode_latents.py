"""Encode images into latents, once, so that training need not.

    python tools/encode_latents.py --source PATH --output DIR [--codec PATH|PRESET|pixel] [--resolution 256] [--batch_size N]

--source is a folder of images (a folder a class), Parquet files, WebDataset tars, a saved data set, or digits. DIR becomes a data
set that training reads (data.dataset latents, data.path DIR) and datasets.load_from_disk opens; see training/data/latents/.

Under torchrun, deepspeed or srun with RANK and WORLD_SIZE set, rank r encodes the shards r, r + W, r + 2 W, ...; the result is
the same with any number of ranks. The same command again goes on after a kill; finished shards are not encoded again.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from latte_flow.model.codecs import PRESETS, LatentCodec, load_codec
from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.data.images import ImageDataset
from latte_flow.training.data.latents.dataset import FORMAT, latent_columns
from latte_flow.training.data.latents.writer import LatentWriter
from latte_flow.training.data.sources import detect_dataset
from latte_flow.training.errors import UserError, exit_code, naming
from latte_flow.training.monitor.progress import hide_library_bars, progress_bar

DEFAULT_PRESET = "dc-ae-f32c32-in-1.0"
POLL_SECONDS = 0.2


def encode_latents(
    *,
    source: str,
    output: str,
    codec: str = DEFAULT_PRESET,
    scaling_factor: float | None = None,
    patch: int = 1,
    dataset: str | None = None,
    image_column: str = "auto",
    text_column: str = "auto",
    class_names: str | None = None,
    max_broken_fraction: float = 0.001,
    resolution: int = 256,
    batch_size: int = 64,
    num_workers: int = 4,
    flip: bool = True,
    shard_size: int = 4096,
    precision: str = "bf16",
    device: str | None = None,
    wait_minutes: float = 60.0,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Encode a data set, or this rank's share of it; the arguments are the command line's (``make_parser``).

    Raises:
        UserError: when an argument, the source or the codec does not fit, the output holds something else, more images are broken
            than accepted, or (rank 0) another rank has stopped.
    """
    _check_numbers(
        {"resolution": resolution, "batch_size": batch_size, "shard_size": shard_size, "patch": patch},
        num_workers=num_workers,
        max_broken_fraction=max_broken_fraction,
        rank=rank,
        world_size=world_size,
    )
    hide_library_bars()
    if dataset is None:
        dataset = "digits" if source == "digits" else detect_dataset(Path(source))
    elif dataset == "latents":
        raise UserError("dataset: latents; accepted: a data set of images")
    images = load_image_dataset(
        DataConfig(
            dataset=dataset,
            path=None if dataset == "digits" else source,
            image_column=image_column,
            text_column=text_column,
            class_names=class_names,
            max_broken_fraction=max_broken_fraction,
            resolution=resolution,
        )
    )
    encoder = _load_encoder(
        codec, scaling_factor, patch, image_channels=images.image_channels, resolution=resolution, precision=precision
    )
    device = device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    kind, path = _kind_and_path(codec)
    settings = {
        "format": FORMAT,
        "source": {
            "dataset": dataset,
            "path": None if dataset == "digits" else str(Path(source).absolute()),
            "fingerprint": images.fingerprint,
            "image_column": image_column,
            "text_column": text_column,
        },
        "codec": {
            "kind": kind,
            "path": path,
            "fingerprint": encoder.fingerprint(),
            "scaling_factor": encoder.scaling_factor,
            "image_channels": encoder.image_channels,
            "precision": precision if kind == "dc-ae" else None,
        },
        "resolution": resolution,
        "latent_shape": [encoder.latent_channels, *encoder.latent_size(resolution)],
        "dtype": "bfloat16",
        "flips": flip,
        "num_images": len(images),
        "shard_size": shard_size,
        "class_names": images.class_names,
    }
    writer = LatentWriter(Path(output), settings)
    if writer.is_finished:
        if rank == 0:
            print(f"{output} is complete: {len(images)} images")
        return
    with progress_bar(total=len(images), unit="image", desc="encoding", disable=rank != 0, mininterval=1.0) as progress:
        _update(progress, writer)
        progress.initial = progress.n  # the rate is that of this start
        mine = [shard for shard in range(rank, writer.num_shards, world_size) if not writer.is_complete(shard)]
        for shard, latents, sources in _encoded_shards(
            writer, mine, images, encoder.to(device), batch_size, num_workers, progress
        ):
            rows = [int(images.prompt_rows[i]) for i in sources]
            conditions = rows if images.class_names is not None else [images.captions[row] for row in rows]
            broken = [i for i, used in zip(writer.rows(shard), sources, strict=True) if i != used]
            writer.write_shard(shard, latents, conditions, sources, {i: images.reason_broken(i) for i in broken})
            _update(progress, writer)
        if rank != 0:
            return
        _wait_for_other_ranks(writer, progress, wait_minutes)
    manifest = writer.finish(images.max_broken)
    statistics = manifest["statistics"]
    print(
        f"{len(images)} images ({manifest['num_broken']} broken) in {output}: latents {tuple(manifest['latent_shape'])}, mean "
        f"{statistics['mean']:.4f}, standard deviation {statistics['std']:.4f}"
    )
    for warning in manifest["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def _check_numbers(positive: dict, *, num_workers: int, max_broken_fraction: float, rank: int, world_size: int) -> None:
    for name, value in positive.items():
        if value < 1:
            raise UserError(f"{name}: got {value}; accepted: 1 or more")
    if num_workers < 0:
        raise UserError(f"num_workers: got {num_workers}; accepted: 0 or more")
    if not 0 <= max_broken_fraction < 1:
        raise UserError(f"max_broken_fraction: got {max_broken_fraction}; accepted: 0 to less than 1")
    if not 0 <= rank < world_size:
        raise UserError(f"RANK: got {rank} with WORLD_SIZE {world_size}; accepted: 0 to WORLD_SIZE - 1")


def _kind_and_path(codec: str) -> tuple[str, str | None]:
    """Return the codec's kind and the folder, hub id or preset that the command line's one word names."""
    return ("pixel", None) if codec == "pixel" else ("dc-ae", codec)


def _load_encoder(
    codec: str, scaling_factor: float | None, patch: int, *, image_channels: int, resolution: int, precision: str
) -> LatentCodec:
    """Load the codec and check that it takes these images.

    Raises:
        UserError: when it cannot be loaded or does not fit.
    """
    kind, path = _kind_and_path(codec)
    try:
        with naming("codec"):
            encoder = load_codec(
                kind,
                path=None if codec in PRESETS else path,
                preset=codec if codec in PRESETS else None,
                scaling_factor=scaling_factor,
                image_channels=image_channels,
                patch=patch,
                dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            )
        encoder.latent_size(resolution)
    except ValueError as error:  # the codec's own checks name the field and what is accepted
        raise UserError(str(error)) from error
    if encoder.image_channels != image_channels:
        raise UserError(
            f"codec: takes {encoder.image_channels} image channels, the images have {image_channels}; accepted: the same"
        )
    return encoder


class _Fetched(Dataset):
    """(index, image, index that the image is of) by index."""

    def __init__(self, images: ImageDataset):
        self.images = images

    def __getitem__(self, index: int):
        return index, *self.images.fetch(index)


def _encoded_shards(
    writer: LatentWriter,
    shards: list[int],
    images: ImageDataset,
    codec: LatentCodec,
    batch_size: int,
    num_workers: int,
    progress: tqdm,
) -> Iterator[tuple[int, dict[str, torch.Tensor], list[int]]]:
    """Yield each shard with its latents [n, C, H, W] bfloat16 by column and the image that each row is of.

    Batches start anew with each shard, so that an image is in the same batch however the shards are spread over ranks.
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
        yield shard, {name: torch.cat(part) for name, part in parts.items()}, sources


def _update(progress: tqdm, writer: LatentWriter) -> int:
    """Let the bar show the images of all complete shards, of all ranks; return how many shards those are."""
    complete = [shard for shard in range(writer.num_shards) if writer.is_complete(shard)]
    progress.n = sum(len(writer.rows(shard)) for shard in complete)
    progress.refresh()
    return len(complete)


def _wait_for_other_ranks(writer: LatentWriter, progress: tqdm, minutes: float) -> None:
    """Wait until every shard is there. Over files, so that the ranks need no process group and may even run one after another."""
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


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="tools/encode_latents.py", description="Encode images into latents for training."
    )
    parser.add_argument("--source", required=True, metavar="PATH", help="images: a folder or file, or digits")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to, or to go on with")
    parser.add_argument(
        "--codec",
        default=DEFAULT_PRESET,
        metavar="PATH|PRESET|pixel",
        help=f"folder or hub id of an AutoencoderDC; {', '.join(PRESETS)}; or pixel (default: {DEFAULT_PRESET})",
    )
    parser.add_argument("--scaling_factor", type=float, help="checked against the checkpoint's")
    parser.add_argument(
        "--patch", type=int, default=1, help="side of a latent position in pixels, for pixel (default: 1)"
    )
    parser.add_argument(
        "--dataset",
        choices=("digits", "imagefolder", "parquet", "webdataset", "saved"),
        help="default: found out from PATH",
    )
    parser.add_argument(
        "--image_column", default="auto", help="column of images; auto: 'image', or the only one (default: auto)"
    )
    parser.add_argument(
        "--text_column",
        default="auto",
        help="captions or classes; auto: text, caption, txt, label or cls (default: auto)",
    )
    parser.add_argument(
        "--class_names", metavar="imagenet-1k|FILE", help="what classes are called; see data.class_names"
    )
    parser.add_argument("--max_broken_fraction", type=float, default=0.001, help="of all images (default: 0.001)")
    parser.add_argument(
        "--resolution", type=int, default=256, help="side of the square images in pixels (default: 256)"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images encoded at once, a rank (default: 64)")
    parser.add_argument("--num_workers", type=int, default=4, help="processes a rank that read images (default: 4)")
    parser.add_argument("--flip", action="store_true", default=True, help="encode the mirrored images too (default)")
    parser.add_argument(
        "--no_flip", dest="flip", action="store_false", help="half the size; train with horizontal_flip false"
    )
    parser.add_argument(
        "--shard_size", type=int, default=4096, help="images a file; a kill loses at most this (default: 4096)"
    )
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), default="bf16", help="of the autoencoder (default: bf16)"
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda when there is one")
    parser.add_argument(
        "--wait_minutes", type=float, default=60.0, help="rank 0 gives up on others after (default: 60)"
    )
    # Set by the deepspeed launcher, which puts it into the environment too.
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Parse and encode this rank's share."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    arguments = vars(make_parser().parse_args())
    del arguments["local_rank"]
    encode_latents(**arguments, rank=int(os.environ.get("RANK", 0)), world_size=int(os.environ.get("WORLD_SIZE", 1)))


def run() -> int:
    """Run the command line and return its exit code (console script)."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
