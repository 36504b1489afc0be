"""Reads DeepSpeed's JSON configuration, fills its "auto" fields from the training configuration, rejects contradictions."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from latte_flow.model.files import read_json
from latte_flow.training.configs.bundled import find_file
from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.errors import UserError, naming

if TYPE_CHECKING:  # distributed/ is a layer above configs/
    from latte_flow.training.distributed.batch_layout import BatchLayout

SUPPORTED_STAGES = (1, 2, 3)
FLOAT32 = "fp32"
"""DeepSpeed's name of it in ``data_types.grad_accum_dtype``."""
UNCHECKED = {"steps_per_print": int, "wall_clock_breakdown": bool, "zero_force_ds_cpu_optimizer": bool}
"""Fields of the files in ds_configs/ that DeepSpeed does not validate; a bad value fails only in the middle of the run."""

AUTO_IS_A_VALUE = ("data_types.keep_in_fp32_modules", "pipeline.stages")
"""Fields in which DeepSpeed itself knows "auto"."""


def deepspeed_file(config: TrainingConfig) -> Path:
    """Return the DeepSpeed configuration file of a run; bundled files are found outside a checkout too.

    Raises:
        UserError: when the file does not exist.
    """
    return find_file("deepspeed", config.deepspeed, "ds_configs", ".json")


def load_deepspeed_config(config: TrainingConfig, layout: "BatchLayout") -> dict:
    """Return DeepSpeed's configuration for this run.

    The batch size, clipping and precision fields take the value of the training configuration if they are "auto" or missing;
    any other value must agree with it. Other "auto" fields of ``zero_optimization`` and ``bf16`` get DeepSpeed's defaults.

    Raises:
        UserError: when the file is missing, is not a JSON object, contradicts the training configuration, or sets a ZeRO stage or
            an option that this trainer does not support.
    """
    path = deepspeed_file(config)
    with naming("deepspeed: "):
        result = read_json(path, copy.copy, "not valid JSON")
    if not isinstance(result, dict):
        raise UserError(f"deepspeed: {path} holds a {type(result).__name__}; accepted: a JSON object")
    for name in ("bf16", "zero_optimization"):
        if not isinstance(result.get(name, {}), dict):
            raise UserError(f"deepspeed: {path} sets {name} to {result[name]!r}; accepted: a JSON object")

    decided = {
        "train_batch_size": ("global_batch_size", layout.global_batch_size),
        "train_micro_batch_size_per_gpu": ("micro_batch_size", layout.micro_batch_size),
        "gradient_accumulation_steps": ("global_batch_size", layout.accumulation_steps),
        "gradient_clipping": ("optimizer.grad_clip", config.optimizer.grad_clip),
        "bf16.enabled": ("precision", config.precision == "bf16"),
        # DeepSpeed does not know AdamW with the moving average.
        "zero_allow_untested_optimizer": ("optimizer", True),
    }
    for key, (field, value) in decided.items():
        *sections, name = key.split(".")
        section = result
        for part in sections:
            section = section.setdefault(part, {})
        given = section.get(name, "auto")
        if given not in ("auto", value):
            raise UserError(f'{field}: requires {key} {value!r}, but {path} sets {given!r}; accepted: "auto" there')
        section[name] = value
    for key in ("optimizer", "scheduler", "fp16"):
        if key in result:
            raise UserError(f"deepspeed: {path} has {key!r}; accepted: no such field, training/main.py sets its own")
    for part, name in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if result.get(part, {}).get(name, True) is not True:  # otherwise a non-finite step would be applied
            raise UserError(f"deepspeed: {path} sets {part}.{name} to {result[part][name]!r}; accepted: true")
    for key, kind in UNCHECKED.items():
        if key in result and (type(result[key]) is not kind or result[key] < 0):
            raise UserError(f"deepspeed: {path} sets {key} to {result[key]!r}; accepted: {kind.__name__}, not negative")
    stage = result.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or stage not in SUPPORTED_STAGES:
        accepted = ", ".join(map(str, SUPPORTED_STAGES))
        raise UserError(f"deepspeed: {path} sets zero_optimization.stage {stage}; accepted: {accepted}")
    if stage == 1 and config.precision == "bf16" and result.get("data_types", {}).get("grad_accum_dtype") == FLOAT32:
        raise UserError(
            f"deepspeed: {path} sets data_types.grad_accum_dtype {FLOAT32} with zero_optimization.stage 1, where DeepSpeed uses "
            "another optimizer, without elastic checkpoints; accepted: stage 2 or 3, or no grad_accum_dtype"
        )
    if config.tensor_parallel > 1 and stage == 3:
        raise UserError(
            f"tensor_parallel: {config.tensor_parallel} with zero_optimization.stage 3 of {path}; accepted: stages 1 and 2, such "
            "as ds_configs/zero2.json, or tensor_parallel 1"
        )
    result |= {name: _without_auto(result[name]) for name in ("bf16", "zero_optimization")}
    _refuse_auto(result, path)
    _check_with_deepspeed(result, path)
    return result


def zero_settings(ds_config: dict) -> DeepSpeedZeroConfig:
    """Return the ZeRO settings of a configuration from ``load_deepspeed_config``, with DeepSpeed's defaults."""
    return DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))


def _without_auto(section: dict) -> dict:
    """Return a section without its "auto" fields. DeepSpeed does so too, but not where it reads the file directly."""
    return {
        name: _without_auto(value) if isinstance(value, dict) else value
        for name, value in section.items()
        if value != "auto"
    }


def _refuse_auto(section: dict, path: Path, prefix: str = "") -> None:
    """Raise UserError for an "auto" field that nothing fills: DeepSpeed would take the word for the value."""
    for name, value in section.items():
        if isinstance(value, dict):
            _refuse_auto(value, path, f"{prefix}{name}.")
        elif value == "auto" and prefix + name not in AUTO_IS_A_VALUE:
            raise UserError(f'deepspeed: {path} sets {prefix}{name} to "auto"; accepted: a value, or no such field')


def _check_with_deepspeed(result: dict, path: Path) -> None:
    """Raise UserError for what DeepSpeed itself rejects, before any rank builds anything."""
    try:
        # The batch size is checked above for the run's number of ranks; a dry run has only one process.
        DeepSpeedConfig({name: copy.deepcopy(value) for name, value in result.items() if name != "train_batch_size"})
    except Exception as error:  # its parsing raises anything: AssertionError, pydantic's, KeyError, TypeError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"deepspeed: DeepSpeed rejects {path}: {reason}") from error
