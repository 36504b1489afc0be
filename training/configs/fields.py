"""The fields of a training run: dataclasses that document each field; its type defines the accepted values.

training/configs/parser.py reads them from YAML files and the command line.
"""

from dataclasses import field
from datetime import timedelta
from typing import Annotated, Literal

from pydantic import Field

from latte_flow.model.codecs import CODECS, PRESETS
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.model.settings import PromptTemplate
from latte_flow.model.solvers import SOLVERS
from latte_flow.model.time_grids import TIME_GRIDS
from latte_flow.training.configs.checked import (
    LIMIT,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OptionalPath,
    PathText,
    PositiveFloat,
    PositiveInt,
    Real,
    checked,
    one_of,
)
from latte_flow.training.errors import UserError

MINUTES_OF_A_YEAR = 365 * 24 * 60
RESUME_AUTO, RESUME_NEVER = "auto", "never"


@checked
class TinyVlmConfig:
    """A tiny random Qwen2-VL with these sizes, used when ``vlm.path`` is not given.

    Args:
        hidden_size: D.
        num_hidden_layers: L.
        num_attention_heads: H.
        num_key_value_heads: G; divides H.
        intermediate_size: width of the MLPs.
        initializer_range: standard deviation of the random weights. With the usual 0.02 a random frozen VLM separates prompts
            too weakly to condition on.
        vocab_size: upper bound of the vocabulary that its tokenizer learns from the prompts.
        seed: seed of the random weights.
    """

    hidden_size: PositiveInt = 128
    num_hidden_layers: PositiveInt = 8
    num_attention_heads: PositiveInt = 4
    num_key_value_heads: PositiveInt = 2
    intermediate_size: PositiveInt = 256
    initializer_range: PositiveFloat = 0.15
    vocab_size: PositiveInt = 512
    seed: NonNegativeInt = 0

    def __post_init__(self):
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (4 * heads):  # the 2D rotary embedding rotates quarters of a head
            raise UserError(
                f"hidden_size: got {self.hidden_size}; accepted: multiples of 4 x num_attention_heads {heads}"
            )
        if heads % shared:
            raise UserError(f"num_key_value_heads: got {shared}; accepted: divisors of num_attention_heads {heads}")


@checked
class VlmConfig:
    """The vision-language model.

    Args:
        path: folder or hub id of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint; null builds the tiny VLM.
        tiny: sizes of the tiny VLM.
        context_cache: with a frozen VLM, the prompts whose context is kept on the device: all; lru, the most recently used;
            none; auto, all if they fit into context_cache_gib, otherwise lru. Losses do not depend on it.
        context_cache_gib: memory for the context cache in GiB per GPU.
    """

    path: OptionalPath = None
    tiny: TinyVlmConfig = field(default_factory=TinyVlmConfig)
    context_cache: Literal["auto", "all", "lru", "none"] = "auto"
    context_cache_gib: PositiveFloat = 8.0


@checked
class CodecConfig:
    """The latent codec.

    Args:
        kind: pixel, an invertible rearrangement of pixels; dc-ae, diffusers' AutoencoderDC; or one that was registered.
        path: folder or hub id of the autoencoder (not for pixel); null uses the preset's.
        preset: a published DC-AE by name; its scaling factor is checked against the loaded checkpoint.
        scaling_factor: factor applied to the latents; checked against the checkpoint's. Null uses the checkpoint's.
        patch: side of one latent position in pixels (pixel only); 1 is the identity.
    """

    kind: Annotated[str, one_of(CODECS)] = "dc-ae"
    path: OptionalPath = None
    preset: Annotated[str, one_of(PRESETS)] | None = None
    scaling_factor: float | None = None
    patch: PositiveInt = 1


@checked
class DataConfig:
    """The training images and their prompts.

    Args:
        dataset: digits, scikit-learn's handwritten digits (8x8 grey); imagefolder, one folder per class (ImageNet's layout) or a
            folder with captions in metadata.jsonl; parquet, files with an image column; webdataset, tar files; saved, a folder
            written by datasets' save_to_disk; hf, a folder or a hub name that datasets.load_dataset loads; latents, a folder
            written by tools/encode_latents.py; or one that was registered. See docs/data.md.
        path: file or folder of the data, for hf also OWNER/NAME on the hub; required except for digits.
        split: the split to train on (hf only), also a part of one such as train[:90%].
        subset: the configuration of the data set, if it has several (hf only).
        image_column: name of the image column; auto uses "image", or the only image column.
        text_column: name of the caption or class column; auto uses the first that exists of text, caption, txt, label, cls.
        class_names: class names for prompts: imagenet-1k, or a text file with one name per line or with lines
            "FOLDER name", such as LOC_synset_mapping.txt. Null: ImageNet's names for its 1000 folders, otherwise the data's own.
        max_broken_fraction: largest accepted fraction of broken images; each is logged and replaced by the next good one.
        resolution: side of the square images in pixels; images of other sizes are resized and center-cropped as in ADM.
        prompt_template: the user message; {} stands for the class name or the caption.
        null_prompt: the user message of the null condition of classifier-free guidance.
        max_prompt_tokens: longer prompts are truncated at the end. All are padded to one length: see docs/train.md, "Prompts".
        condition_drop: fraction of samples whose prompt is replaced by the null prompt (paper: 0.1).
        horizontal_flip: whether half of the images are mirrored.
        num_workers: data worker processes per rank; 0 prepares batches in the training process.
        allow_changed: resume a run even if its data or prompts changed since it was started; data.json then lists both.
    """

    dataset: str = "digits"
    path: OptionalPath = None
    split: str = "train"
    subset: str | None = None
    image_column: str = "auto"
    text_column: str = "auto"
    class_names: OptionalPath = None
    max_broken_fraction: Fraction = 0.001
    resolution: PositiveInt = 256
    prompt_template: PromptTemplate = "Generate an image of {}."
    null_prompt: str = ""
    max_prompt_tokens: PositiveInt = 256
    condition_drop: Fraction = 0.1
    horizontal_flip: bool = True
    num_workers: NonNegativeInt = 4
    allow_changed: bool = False


@checked
class OptimizerConfig:
    """AdamW, its learning rate, gradient clipping and the moving average of the weights.

    Args:
        lr: learning rate after warm-up, constant (paper: 5e-4).
        betas: AdamW's decay rates of the moments.
        weight_decay: weight decay of weight matrices; norms, biases, modulation, gates and embeddings have none.
        grad_clip: maximum gradient norm; 0 disables clipping.
        warmup_steps: steps over which the learning rate grows linearly to lr.
        ema_decay: decay of the exponential moving average that is sampled and evaluated; lower in early steps, see optimizer.py.
    """

    lr: PositiveFloat = 5e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: NonNegativeFloat = 0.01
    grad_clip: NonNegativeFloat = 1.0
    warmup_steps: NonNegativeInt = 1000
    ema_decay: Fraction = 0.9999

    def __post_init__(self):
        for i, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                raise UserError(f"betas[{i}]: got {beta}; accepted: 0 to less than 1")


@checked
class CheckpointConfig:
    """Checkpoints.

    Args:
        every: steps between checkpoints; one is always written at the end.
        keep_last: number of newest checkpoints to keep; 0 keeps all.
        keep_every: checkpoints at multiples of this step are never deleted; 0 disables this.
        asynchronous: whether training continues while a checkpoint is written; host memory then holds a copy of the state.
    """

    every: PositiveInt = 5000
    keep_last: NonNegativeInt = 3
    keep_every: NonNegativeInt = 0
    asynchronous: bool = False


@checked
class HealthConfig:
    """Health checks of a running training.

    Args:
        max_skipped_steps: the run fails after this many consecutive steps with a non-finite loss or gradient; fewer are skipped
            and counted.
        spike_ratio: a step whose loss exceeds this many times the median of the preceding steps is reported as a spike.
        spike_window: number of steps the median is taken over.
        hang_minutes: if a rank makes no progress for this long, the run exits and reports which rank hangs and where.
    """

    max_skipped_steps: PositiveInt = 10
    spike_ratio: PositiveFloat = 3.0
    spike_window: PositiveInt = 100
    hang_minutes: Annotated[float, Field(strict=True, gt=0, le=MINUTES_OF_A_YEAR)] = 15.0

    @property
    def patience(self) -> timedelta:
        """Timeout of collectives. Longer than the watchdog's, which reports who hangs; a collective's timeout does not."""
        return timedelta(minutes=self.hang_minutes + 10)


@checked
class LoggingConfig:
    """metrics.jsonl and TensorBoard.

    Args:
        every: steps between log entries; losses are averaged over the steps in between.
        timestep_bins: number of equal bins of tau that the loss is reported for.
    """

    every: PositiveInt = 50
    timestep_bins: PositiveInt = 10


@checked
class SampleConfig:
    """The fixed-seed sample grid drawn from the averaged weights during training.

    Args:
        every: steps between grids; one is always drawn at the end. 0 draws none.
        num_images: images in a grid, one per prompt in order, starting over after the last prompt.
        num_steps: sampling steps (paper: 40).
        cfg_scale: classifier-free guidance scale; 1 disables guidance (paper: 5).
        solver: euler, heun, ab2, dpmpp or sde (docs/sampling.md), or one that was registered.
        time_grid: uniform, or shifted towards the noise.
        shift: of the shifted grid; null: sqrt(image tokens / 64).
        align_to_experts: whether to move the nearest timestep onto each boundary between experts.
        allow_skipped_experts: whether fewer steps than experts are accepted.
        seed: seed of the grid's noise.
    """

    every: NonNegativeInt = 5000
    num_images: PositiveInt = 64
    num_steps: PositiveInt = 40
    cfg_scale: Real = 5.0
    solver: Annotated[str, one_of(SOLVERS)] = "euler"
    time_grid: Annotated[str, one_of(TIME_GRIDS)] = "uniform"
    shift: PositiveFloat | None = None
    align_to_experts: bool = False
    allow_skipped_experts: bool = False
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0  # 64 bits together with the image's index


@checked
class NetworkConfig:
    __doc__ = LatteFlowConfig.__doc__  # the same fields; LatteFlowConfig also checks their values

    variant: Literal["couple", "blend"] = "couple"
    shared_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    num_groups: PositiveInt = 4
    timestep_overlap: Real = 100.0
    timestep_boundaries: list[float] | None = None
    group_io: Literal["shared", "per_group"] = "shared"
    residual_attention: bool = True
    residual_source: Literal["raw", "accumulated"] = "raw"
    residual_space: Literal["logits", "probabilities"] = "logits"
    attention_backend: Literal["auto", "reference", "sdpa", "flash"] = "auto"
    context_projection: Literal["generation", "vlm"] = "generation"
    post_norm: bool = True
    modulation: Literal["four", "six"] = "four"
    patch_size: PositiveInt = 1
    rope_2d_theta: PositiveFloat = 10000.0
    timestep_frequencies: PositiveInt = 256


@checked
class TrainingConfig:
    """A training run.

    Args:
        output_dir: folder for all output; running the same command again resumes the run in it.
        deepspeed: DeepSpeed's JSON configuration; its "auto" fields are filled from this configuration.
        resume: auto, resume from the newest valid checkpoint of output_dir; never, reject an output_dir that has checkpoints; or
            a checkpoint of another run to start a new output_dir from.
        init_from: weights in any format (docs/checkpoints.md) of the same network to start a new run from at step 0; from a
            checkpoint, the averaged weights. Null: the VLM's weights and random ones.
        run_id: names the run; drawn when an output_dir is first used, kept in its config.yaml and in the manifests of its
            checkpoints. Not for the command line: what is given there is not used.
        seed: seed of all randomness; each random number depends only on it and the sample's global index.
        max_steps: optimizer steps of the whole run.
        global_batch_size: samples per optimizer step over all ranks.
        micro_batch_size: samples per rank and forward pass; a multiple of the number of groups. Null: the largest that needs
            no gradient accumulation.
        tensor_parallel: number of ranks that split the heads and hidden units of every layer and train the same samples; must
            divide the number of ranks, the heads and the hidden units. With ZeRO stages 1 and 2 only. See docs/train.md.
        activation_checkpointing: whether to keep only the input of each layer and compute the layer again in the backward pass:
            less memory, about a third more operations, the same losses. See docs/train.md.
        objectives: what the run trains for, name -> weight of its loss: flow_matching, or one that was registered
            (docs/extending.md). The losses are added; all of them train in every step.
        groups_per_sample: 1, each sample trains one group, assigned evenly (stratified); all, every sample trains every group at
            its own timestep, which takes K times the compute.
        precision: bf16, weights and activations in bfloat16 with float32 master weights; fp32.
    """

    output_dir: PathText = "runs/latte_flow"
    deepspeed: PathText = "ds_configs/zero2.json"
    resume: PathText = "auto"
    init_from: OptionalPath = None
    run_id: str | None = None
    seed: NonNegativeInt = 0
    max_steps: PositiveInt = 240_000
    global_batch_size: PositiveInt = 2048
    micro_batch_size: int | None = None
    tensor_parallel: PositiveInt = 1
    activation_checkpointing: bool = False
    objectives: dict[str, float] = field(default_factory=lambda: {"flow_matching": 1.0})
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
    model: NetworkConfig = field(default_factory=NetworkConfig)

    def __post_init__(self):
        if not self.objectives:
            raise UserError("objectives: got none; accepted: one or more, each with its weight")
        for name, weight in self.objectives.items():
            if not 0 < weight < LIMIT:
                raise UserError(f"objectives.{name}: got {weight}; accepted: a weight greater than 0")


@checked
class Assumptions:
    """Assumptions of a dry run: what it cannot count.

    Args:
        gpus: number of ranks.
        gpu_gib: memory of one GPU, GiB (A100, H100: 80; H200: 140). A run fits that is counted at 90 % of it.
        peak_tflops: peak of one GPU, TFLOP/s (dense bf16 of an H100 or H200: 989.5).
        utilisation: fraction of the peak that training reaches.
        num_prompts: number of distinct prompts, including the null prompt (ImageNet-1k: 1001).
        prompt_tokens: tokens per prompt in the chat format.
    """

    gpus: PositiveInt = 8
    gpu_gib: PositiveFloat = 80.0
    peak_tflops: PositiveFloat = 989.5
    utilisation: PositiveFloat = 0.4
    num_prompts: PositiveInt = 1001
    prompt_tokens: PositiveInt = 32
