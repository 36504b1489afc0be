"""The config doctor: warns of what wastes GPU hours, before the first step. Each warning names the field and the remedy.

What cannot work is an error elsewhere. These work, and are rarely meant.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.training.components import Images
from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.data.latents.dataset import LatentDataset
from latte_flow.training.data.latents.writer import UNIT_STD
from latte_flow.training.distributed.collectives import print_once
from latte_flow.training.distributed.ranks import Ranks
from latte_flow.training.optimizer import BYTES_PER_PARAMETER

FULL_SIZE = 100_000_000
"""Trained parameters from which a run is compared with the recipe of the paper."""
RECIPE_BATCH, RECIPE_LR = 2048, 5e-4
"""The paper's (section 7)."""
LR_FACTOR = 4.0
RECIPE_RESOLUTION, RECIPE_PARAMETERS = 256, {"couple": 1.58e9, "blend": 2.93e9}
"""Trained parameters of the presets for ImageNet, couple_imagenet256 and blend_imagenet256."""


@dataclass(frozen=True)
class Facts:
    """What the doctor knows of a run beside its configuration.

    Attributes:
        trained: trained parameters of the whole network.
        weights_bytes: of the whole network in the compute dtype.
        num_groups: K.
        latent_std: standard deviation of pre-encoded latents; None without them.
        seconds_per_step: measured or estimated; None if unknown.
    """

    trained: int
    weights_bytes: int
    num_groups: int
    latent_std: float | None = None
    seconds_per_step: float | None = None


Check = Callable[[TrainingConfig, Facts], str | None]


def _clipping(config: TrainingConfig, facts: Facts) -> str | None:
    if config.optimizer.grad_clip > 0:
        return None
    return "optimizer.grad_clip: 0 disables clipping, and one bad batch can ruin the run; the paper's: 1.0"


def _random_vlm(config: TrainingConfig, facts: Facts) -> str | None:
    if config.vlm.path is not None or config.data.dataset == "digits":
        return None
    return (
        "vlm.path: null builds a tiny VLM with random weights, which understands no caption; for a real run: a folder or hub id, "
        "such as Qwen/Qwen2-VL-2B-Instruct"
    )


def _latent_deviation(config: TrainingConfig, facts: Facts) -> str | None:
    low, high = UNIT_STD
    if facts.latent_std is None or low <= facts.latent_std <= high:
        return None
    return (
        f"data.path: the latents' standard deviation is {facts.latent_std:.4g}, outside {low:g} to {high:g}, and the noise's "
        "is 1; encode them again with the scaling factor of their autoencoder"
    )


def _few_parameters(config: TrainingConfig, facts: Facts) -> str | None:
    if facts.trained == 0:
        return "model: no parameter is trained; objectives, model.variant and model.shared_modules decide what is"
    expected = RECIPE_PARAMETERS[config.model.variant]
    if config.data.resolution < RECIPE_RESOLUTION or facts.trained >= expected / 10:
        return None
    return (
        f"model: {facts.trained / 1e6:,.2f} M parameters are trained, the presets for {RECIPE_RESOLUTION}x{RECIPE_RESOLUTION} "
        f"images train {expected / 1e6:,.0f} M; vlm.path (now {config.vlm.path}) decides the size"
    )


def _skipped_experts(config: TrainingConfig, facts: Facts) -> str | None:
    if not config.sample.every or config.sample.num_steps >= facts.num_groups:
        return None
    return (
        f"sample.num_steps: {config.sample.num_steps} steps of a sample grid cannot run all {facts.num_groups} experts; "
        f"{facts.num_groups} or more show them all"
    )


def _learning_rate(config: TrainingConfig, facts: Facts) -> str | None:
    """Compare with the paper's, scaled with the square root of the batch: between no scaling and linear scaling."""
    expected = RECIPE_LR * math.sqrt(config.global_batch_size / RECIPE_BATCH)
    if facts.trained < FULL_SIZE or expected / LR_FACTOR <= config.optimizer.lr <= expected * LR_FACTOR:
        return None
    return (
        f"optimizer.lr: {config.optimizer.lr:g} at global_batch_size {config.global_batch_size}; the paper's {RECIPE_LR:g} at "
        f"{RECIPE_BATCH} scales to {expected:.2g} with the square root of the batch"
    )


def _checkpoint_interval(config: TrainingConfig, facts: Facts) -> str | None:
    end = os.environ.get("SLURM_JOB_END_TIME")
    if end is None or facts.seconds_per_step is None:
        return None
    left, interval = float(end) - time.time(), facts.seconds_per_step * config.checkpoint.every
    if interval <= left:
        return None
    return (
        f"checkpoint.every: {config.checkpoint.every} steps take {interval / 3600:.2g} hours, and the job ends in "
        f"{max(left, 0) / 3600:.2g}: a kill would lose all of them; at most {max(int(left / facts.seconds_per_step), 1)} "
        "would not"
    )


def _disk(config: TrainingConfig, facts: Facts) -> str | None:
    size = facts.trained * BYTES_PER_PARAMETER + facts.weights_bytes
    kept = config.checkpoint.keep_last or config.max_steps // config.checkpoint.every
    needed = (kept + 1) * size  # the oldest is removed after the newest is written
    folder = Path(config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return None
    return (
        f"checkpoint.keep_last: {kept + 1} checkpoints of {size / 2**30:.3g} GiB need {needed / 2**30:.3g} GiB, and "
        f"{free / 2**30:.3g} GiB are free for output_dir {config.output_dir}; fewer checkpoints or another disk fit"
    )


CHECKS: tuple[Check, ...] = (
    _clipping,
    _random_vlm,
    _latent_deviation,
    _few_parameters,
    _skipped_experts,
    _learning_rate,
    _checkpoint_interval,
    _disk,
)


def examine(config: TrainingConfig, facts: Facts) -> list[str]:
    """Return the warnings about a run, each one line with the field and the remedy."""
    return [warning for check in CHECKS if (warning := check(config, facts)) is not None]


def facts_of(model: LatteFlowModel, sizes: Mapping[str, int], latent_std: float | None = None) -> Facts:
    """Return the facts of a network.

    Args:
        model: the network, or a part of it.
        sizes: number of elements of each whole parameter.
        latent_std: standard deviation of pre-encoded latents.
    """
    parameters = dict(model.named_parameters())
    return Facts(
        trained=sum(sizes[name] for name, p in parameters.items() if p.requires_grad),
        weights_bytes=sum(sizes[name] * p.element_size() for name, p in parameters.items()),
        num_groups=model.experts.num_groups,
        latent_std=latent_std,
    )


class Doctor:
    """Warns of a run that trains, each warning once.

    Args:
        config: the run.
        model: its network, or this rank's part of it.
        ranks: which part.
        images: its data.
    """

    def __init__(self, config: TrainingConfig, model: LatteFlowModel, ranks: Ranks, images: Images):
        sizes = {name: ranks.whole_size(name, p) for name, p in model.named_parameters()}
        latent_std = images.manifest["statistics"]["std"] if isinstance(images, LatentDataset) else None
        self.config, self.facts = config, facts_of(model, sizes, latent_std)
        self._printed: set[str] = set()

    def examine(self, seconds_per_step: float | None = None) -> None:
        """Print new warnings, at the start, and again with the measured time of a step."""
        self.facts = replace(self.facts, seconds_per_step=seconds_per_step)
        for warning in examine(self.config, self.facts):
            if warning not in self._printed:
                self._printed.add(warning)
                print_once(f"warning: {warning}")
