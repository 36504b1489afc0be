"""The fields of a training run: typed dataclasses, each with the meaning of its fields and a check of their values.

The fields under ``model`` are those of model.configuration.LatteFlowConfig. training/configs/parser.py reads them all, from YAML
files and the command line.
"""

import math
import os
import string
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Literal

from latte_flow.training.errors import UserError

MINUTES_OF_A_YEAR = 365 * 24 * 60
RESUME_AUTO, RESUME_NEVER = "auto", "never"
LIMIT = 2**64
"""No number of a run reaches it: beyond, integers become no floats."""


@dataclass
class TinyVlmConfig:
    """A tiny random Qwen2-VL, built from these sizes where ``vlm.path`` is not given.

    Args:
        hidden_size: D.
        num_hidden_layers: L.
        num_attention_heads: H.
        num_key_value_heads: G; divides H.
        intermediate_size: width of the MLPs.
        initializer_range: standard deviation of the random weights. At the usual 0.02 a random frozen VLM tells prompts apart
            too weakly to condition on.
        vocab_size: upper bound of the vocabulary that its tokenizer learns from the prompts.
        seed: of the random weights.
    """

    hidden_size: int = 128
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int = 256
    initializer_range: float = 0.15
    vocab_size: int = 512
    seed: int = 0


@dataclass
class VlmConfig:
    """The vision-language model.

    Args:
        path: folder or hub id of a Qwen2-VL or Qwen2.5-VL checkpoint; null builds the tiny one.
        tiny: sizes of the tiny VLM.
        context_cache: for a frozen VLM, of which prompts the context is kept on the device: all; lru, the most recently used;
            none; auto, all when they fit into context_cache_gib, else lru. Losses are the same with each.
        context_cache_gib: memory for it, a GPU.
    """

    path: str | None = None
    tiny: TinyVlmConfig = field(default_factory=TinyVlmConfig)
    context_cache: Literal["auto", "all", "lru", "none"] = "auto"
    context_cache_gib: float = 8.0


@dataclass
class CodecConfig:
    """The latent codec.

    Args:
        kind: pixel, an invertible rearrangement of pixels; dc-ae, diffusers' AutoencoderDC.
        path: folder or hub id of the autoencoder, for dc-ae; null takes the preset's.
        preset: a published DC-AE by name; its scaling factor is checked against the checkpoint that is loaded.
        scaling_factor: what latents are multiplied by; checked against the checkpoint's. Null takes the checkpoint's.
        patch: side in pixels of one latent position, for pixel; 1 is the identity.
    """

    kind: Literal["pixel", "dc-ae"] = "dc-ae"
    path: str | None = None
    preset: Literal["dc-ae-f32c32-in-1.0", "dc-ae-f32c32-sana-1.0"] | None = None
    scaling_factor: float | None = None
    patch: int = 1


@dataclass
class DataConfig:
    """The training images and their prompts.

    Args:
        dataset: digits, scikit-learn's handwritten digits (8x8 grey); imagefolder, a folder a class (ImageNet's layout) or a
            folder with a metadata.jsonl of captions; parquet, files with an image column; webdataset, tar files; saved, a folder
            written by datasets' save_to_disk; latents, a folder written by tools/encode_latents.py. See docs/data.md.
        path: file or folder of the data, for all but digits.
        image_column: name of the column of images; auto takes "image", or the only one.
        text_column: name of the column of captions or classes; auto takes the first there is of text, caption, txt, label, cls.
        class_names: what classes are called in prompts: imagenet-1k, or a text file with a name a line or with lines
            "FOLDER name", such as LOC_synset_mapping.txt. Null: ImageNet's names for its 1000 folders, otherwise the data's own.
        max_broken_fraction: up to which fraction of all images may be broken; such are logged and replaced by the next good one.
        resolution: side of the square images in pixels; pictures of other sizes are scaled and cropped to the middle as ADM does.
        prompt_template: the user message; {} stands for the class name or the caption.
        null_prompt: the user message of the null condition of classifier-free guidance.
        max_prompt_tokens: longer prompts lose their end; every context is as long as the longest prompt.
        condition_drop: fraction of samples whose prompt is replaced by the null prompt (paper: 0.1).
        horizontal_flip: whether half of the images are mirrored.
        num_workers: processes a rank that prepare batches; 0 prepares them in the training process.
        allow_changed: go on with a run although its data have changed since it was started; data.json then lists both.
    """

    dataset: Literal["digits", "imagefolder", "parquet", "webdataset", "saved", "latents"] = "digits"
    path: str | None = None
    image_column: str = "auto"
    text_column: str = "auto"
    class_names: str | None = None
    max_broken_fraction: float = 0.001
    resolution: int = 256
    prompt_template: str = "Generate an image of {}."
    null_prompt: str = ""
    max_prompt_tokens: int = 256
    condition_drop: float = 0.1
    horizontal_flip: bool = True
    num_workers: int = 4
    allow_changed: bool = False


@dataclass
class OptimizerConfig:
    """AdamW, its learning rate, gradient clipping and the moving average of the weights.

    Args:
        lr: learning rate after warm-up, constant (paper: 5e-4).
        betas: AdamW's decay rates of the moments.
        weight_decay: on weight matrices; norms, biases, modulation and gates have none.
        grad_clip: largest norm of the gradient; 0 turns clipping off.
        warmup_steps: steps over which the learning rate grows linearly to lr.
        ema_decay: decay of the exponential moving average that is sampled and evaluated; early steps use less, see ema.py.
    """

    lr: float = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    warmup_steps: int = 1000
    ema_decay: float = 0.9999


@dataclass
class CheckpointConfig:
    """Checkpoints.

    Args:
        every: steps between two checkpoints; one is always written at the end.
        keep_last: how many of the newest are kept; 0 keeps all.
        keep_every: checkpoints of steps that are multiples of it are kept for good; 0 for none.
        asynchronous: whether training goes on while a checkpoint is written; the host's memory then holds a copy of the state.
    """

    every: int = 5000
    keep_last: int = 3
    keep_every: int = 0
    asynchronous: bool = False


@dataclass
class HealthConfig:
    """What is watched while a run trains.

    Args:
        max_skipped_steps: so many steps in a row whose loss or gradient is not finite end the run; fewer are skipped and counted.
        spike_ratio: a step whose loss is more than so many times the median of the steps before is reported as a spike.
        spike_window: how many steps the median is over.
        hang_minutes: a run in which a rank has not moved on for so long ends and says which, and where it stands.
    """

    max_skipped_steps: int = 10
    spike_ratio: float = 3.0
    spike_window: int = 100
    hang_minutes: float = 15.0

    @property
    def patience(self) -> timedelta:
        """How long a collective may take. Longer than the watchdog waits: it says who hangs, a collective's timeout does not."""
        return timedelta(minutes=self.hang_minutes + 10)


@dataclass
class LoggingConfig:
    """metrics.jsonl and TensorBoard.

    Args:
        every: steps between two logged ones; losses are averaged over the steps in between.
        timestep_bins: into how many equal bins of tau the loss is split.
    """

    every: int = 50
    timestep_bins: int = 10


@dataclass
class SampleConfig:
    """The fixed-seed sample grid drawn from the averaged weights during training.

    Args:
        every: steps between two grids; one is always drawn at the end. 0 draws none.
        num_images: images in a grid; they run through the first prompts evenly.
        num_steps: steps of the sampler (paper: 40).
        cfg_scale: classifier-free guidance; 1 is none (paper: 5).
        solver: euler or heun.
        seed: of the grid's noise.
    """

    every: int = 5000
    num_images: int = 64
    num_steps: int = 40
    cfg_scale: float = 5.0
    solver: Literal["euler", "heun"] = "euler"
    seed: int = 0


@dataclass
class TrainingConfig:
    """A training run.

    Args:
        output_dir: where everything is written; the same command again resumes what is there.
        deepspeed: DeepSpeed's JSON configuration; its "auto" fields are filled from here.
        resume: auto, go on from the newest valid checkpoint of output_dir; never, refuse an output_dir that has checkpoints; or a
            checkpoint of another run, which a new output_dir starts from.
        init_from: weights of any format (docs/checkpoints.md), of the same network, that a new run starts from at step 0; of a
            checkpoint its averaged ones. Null: the VLM's weights and random ones.
        seed: of everything random; each draw depends on the seed and the sample's global index alone.
        max_steps: optimizer steps of the whole run.
        global_batch_size: samples per optimizer step over all ranks.
        micro_batch_size: samples per rank and forward pass; a multiple of the number of groups. Null: the largest that needs
            no gradient accumulation.
        tensor_parallel: how many ranks share the heads and hidden units of every layer and train the same samples; it divides the
            number of ranks and what is shared. With ZeRO stages 1 and 2. See docs/train.md.
        groups_per_sample: 1, each sample trains one group, samples dealt evenly (stratified); all, every sample trains every
            group at its own timestep, K times the work.
        precision: bf16, weights and activations in bfloat16 with float32 master weights; fp32.
    """

    output_dir: str = "runs/latte_flow"
    deepspeed: str = "ds_configs/zero2.json"
    resume: str = "auto"
    init_from: str | None = None
    seed: int = 0
    max_steps: int = 240_000
    global_batch_size: int = 2048
    micro_batch_size: int | None = None
    tensor_parallel: int = 1
    groups_per_sample: Literal[1, "all"] = 1
    precision: Literal["bf16", "fp32"] = "bf16"
    vlm: VlmConfig = field(default_factory=VlmConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    model: dict = field(default_factory=dict)

    def __post_init__(self):
        positive = {
            "max_steps": self.max_steps,
            "global_batch_size": self.global_batch_size,
            "tensor_parallel": self.tensor_parallel,
            "checkpoint.every": self.checkpoint.every,
            "health.max_skipped_steps": self.health.max_skipped_steps,
            "health.spike_ratio": self.health.spike_ratio,
            "health.spike_window": self.health.spike_window,
            "health.hang_minutes": self.health.hang_minutes,
            "logging.every": self.logging.every,
            "logging.timestep_bins": self.logging.timestep_bins,
            "data.resolution": self.data.resolution,
            "data.max_prompt_tokens": self.data.max_prompt_tokens,
            "optimizer.lr": self.optimizer.lr,
            "sample.num_steps": self.sample.num_steps,
            "sample.num_images": self.sample.num_images,
            "codec.patch": self.codec.patch,
            "vlm.context_cache_gib": self.vlm.context_cache_gib,
        }
        positive |= {f"vlm.tiny.{name}": value for name, value in vars(self.vlm.tiny).items() if name != "seed"}
        for name, value in positive.items():
            if not 0 < value < LIMIT:  # nor is NaN
                raise UserError(f"{name}: got {value}; accepted: greater than 0, less than 2^64")
        tiny = self.vlm.tiny
        if tiny.hidden_size % (4 * tiny.num_attention_heads):  # the 2D rotary embedding turns quarters of a head
            raise UserError(
                f"vlm.tiny.hidden_size: got {tiny.hidden_size}; accepted: multiples of 4 x num_attention_heads "
                f"{tiny.num_attention_heads}"
            )
        if tiny.num_attention_heads % tiny.num_key_value_heads:
            raise UserError(
                f"vlm.tiny.num_key_value_heads: got {tiny.num_key_value_heads}; accepted: divisors of num_attention_heads "
                f"{tiny.num_attention_heads}"
            )
        fractions = {
            "data.condition_drop": self.data.condition_drop,
            "data.max_broken_fraction": self.data.max_broken_fraction,
            "optimizer.ema_decay": self.optimizer.ema_decay,
        }
        fractions |= {f"optimizer.betas[{i}]": beta for i, beta in enumerate(self.optimizer.betas)}
        for name, value in fractions.items():
            if not 0 <= value < 1:
                raise UserError(f"{name}: got {value}; accepted: 0 to less than 1")
        not_negative = {
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "optimizer.grad_clip": self.optimizer.grad_clip,
            "optimizer.warmup_steps": self.optimizer.warmup_steps,
            "checkpoint.keep_last": self.checkpoint.keep_last,
            "checkpoint.keep_every": self.checkpoint.keep_every,
            "data.num_workers": self.data.num_workers,
            "sample.every": self.sample.every,
        }
        for name, value in not_negative.items():
            if not 0 <= value < LIMIT:
                raise UserError(f"{name}: got {value}; accepted: 0 or more, less than 2^64")
        if self.health.hang_minutes > MINUTES_OF_A_YEAR:
            raise UserError(
                f"health.hang_minutes: got {self.health.hang_minutes}; accepted: at most {MINUTES_OF_A_YEAR}"
            )
        # The generator takes 64 bits; a picture's seed is the run's and the picture's number, 32 bits each.
        for name, value, bits in (
            ("seed", self.seed, 64),
            ("vlm.tiny.seed", self.vlm.tiny.seed, 64),
            ("sample.seed", self.sample.seed, 32),
        ):
            if not 0 <= value < 2**bits:
                raise UserError(f"{name}: got {value}; accepted: 0 to 2^{bits} - 1")
        if not math.isfinite(self.sample.cfg_scale):
            raise UserError(f"sample.cfg_scale: got {self.sample.cfg_scale}; accepted: a finite number")
        paths = {
            "output_dir": self.output_dir,
            "deepspeed": self.deepspeed,
            "resume": self.resume,
            "init_from": self.init_from,
        }
        paths |= {"data.path": self.data.path, "data.class_names": self.data.class_names}
        paths |= {"vlm.path": self.vlm.path, "codec.path": self.codec.path}
        for name, value in paths.items():
            if value is not None and not _is_path(value):
                raise UserError(f"{name}: got {value[:80]!r} ({len(value)} characters); accepted: a path")
        if not _has_one_blank(self.data.prompt_template):
            raise UserError(
                f"data.prompt_template: got {self.data.prompt_template!r}; accepted: a text with {{}} exactly once"
                " (other braces doubled)"
            )


def _is_path(text: str) -> bool:
    """Return whether the file system can be asked for a path at all."""
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return b"\0" not in encoded and len(encoded) < 4096 and all(len(part) < 256 for part in encoded.split(b"/"))


def _has_one_blank(template: str) -> bool:
    """Return whether ``template.format(x)`` puts x in at exactly one place, as it is."""
    try:
        blanks = [blank for _, *blank in string.Formatter().parse(template) if blank[0] is not None]
        return blanks == [["", "", None]]  # name, format and conversion: {:>9999999999} would fill the memory
    except ValueError:  # a single brace
        return False


@dataclass(frozen=True)
class Assumptions:
    """What a dry run cannot count.

    Args:
        gpus: number of ranks.
        peak_tflops: peak of one GPU, TFLOP/s (dense bf16 of an H100 or H200: 989.5).
        utilisation: share of the peak that training reaches.
        num_prompts: distinct prompts, the null prompt included (ImageNet-1k: 1001).
        prompt_tokens: tokens of a prompt in the chat format.
    """

    gpus: int = 8
    peak_tflops: float = 989.5
    utilisation: float = 0.4
    num_prompts: int = 1001
    prompt_tokens: int = 32

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 < value < LIMIT:
                raise UserError(f"assume.{name}: got {value}; accepted: greater than 0, less than 2^64")
