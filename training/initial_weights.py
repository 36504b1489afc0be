"""``init_from``: the weights a new run starts from at step 0."""

from pathlib import Path

from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.training.checkpoint.formats.matching import load_weights
from latte_flow.training.checkpoint.manifest import CHECKPOINTS_FOLDER, list_checkpoints
from latte_flow.training.checkpoint.model_folder import PIPELINE_FILE
from latte_flow.training.checkpoint.opening import OpenedCheckpoint, open_checkpoint
from latte_flow.training.configs.fields import RESUME_AUTO, RESUME_NEVER, TrainingConfig
from latte_flow.training.errors import UserError


def find_initial_weights(config: TrainingConfig) -> OpenedCheckpoint | None:
    """Return the weights that ``init_from`` names, or None if it is unset or the run has its own checkpoints.

    Raises:
        UserError: when it holds no readable weights, or ``resume`` names another start.
    """
    if config.init_from is None or list_checkpoints(Path(config.output_dir) / CHECKPOINTS_FOLDER):
        return None
    if config.resume not in (RESUME_AUTO, RESUME_NEVER):
        raise UserError(f"init_from, resume: got {config.init_from} and {config.resume}; accepted: one of them")
    try:
        opened = open_checkpoint(Path(config.init_from))
    except UserError as error:
        raise UserError(f"init_from: {error}") from error
    if opened.components is None or not (opened.components / PIPELINE_FILE).is_file():
        raise UserError(
            f"init_from: {config.init_from} has no {PIPELINE_FILE} beside it; accepted: a checkpoint, or a folder of "
            "tools/convert_checkpoint.py"
        )
    return opened


def load_initial_weights(model: LatteFlowModel, opened: OpenedCheckpoint) -> str:
    """Load weights into a new model, averaged ones if available. Return a readable description of what was loaded.

    Raises:
        UserError: when the weights do not fit this network.
    """
    source = opened.source
    try:
        load_weights(model, source, source.default_kind)
    except ValueError as error:
        raise UserError(f"init_from: {source.path}: {error}") from error
    step = "" if source.step is None else f" of step {source.step}"
    return f"initial weights from {source.path} ({source.format}, {source.default_kind}{step})"
