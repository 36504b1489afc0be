"""``init_from``: the weights a new run starts from at step 0."""

from pathlib import Path

from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.training.checkpoint.elastic import write_master_weights
from latte_flow.training.checkpoint.formats.matching import load_weights
from latte_flow.training.checkpoint.manifest import CHECKPOINTS_FOLDER, list_checkpoints
from latte_flow.training.checkpoint.model_folder import PIPELINE_FILE
from latte_flow.training.checkpoint.opening import OpenedCheckpoint, open_checkpoint
from latte_flow.training.configs.fields import RESUME_AUTO, RESUME_NEVER, TrainingConfig
from latte_flow.training.distributed.collectives import print_once
from latte_flow.training.errors import UserError


class InitialWeights:
    """The weights of a checkpoint in any format; averaged ones if available.

    Args:
        opened: the checkpoint.
    """

    def __init__(self, opened: OpenedCheckpoint):
        self.source, self.components = opened.source, opened.components
        self._names: dict[str, str] = {}  # in the network -> in the checkpoint

    def load(self, model: LatteFlowModel) -> None:
        """Load the weights into a new network.

        Raises:
            UserError: when they do not fit it.
        """
        source = self.source
        try:
            self._names = load_weights(model, source, source.default_kind)
        except ValueError as error:
            raise UserError(f"init_from: {source.path}: {error}") from error
        step = "" if source.step is None else f" of step {source.step}"
        print_once(f"initial weights from {source.path} ({source.format}, {source.default_kind}{step})")

    def write_master_weights(self, engine) -> None:
        """Write the float32 master weights of an engine over that network, which DeepSpeed rounds to bfloat16. Collective."""
        write_master_weights(engine, self.source, self.source.default_kind, self._names)


def find_initial_weights(config: TrainingConfig) -> InitialWeights | None:
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
    return InitialWeights(opened)
