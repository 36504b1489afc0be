"""The output_dir of a run: its allowed content at the start, the checkpoint to start from, the files written before step 1."""

import hashlib
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from latte_flow.model.backbone import checkpoint_folder, load_image_processor
from latte_flow.model.codecs import codec_checkpoint
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.tiny_vlm import build_tiny_image_processor
from latte_flow.training.checkpoint.formats.source import EXPORT_FILE, read_export_record, require_export_record
from latte_flow.training.checkpoint.formats.universal import UniversalSource
from latte_flow.training.checkpoint.manifest import (
    CHECKPOINTS_FOLDER,
    MODEL_FOLDER,
    STEP_FOLDER,
    list_checkpoints,
    named_checkpoints,
    output_dir_of,
    read_manifest,
)
from latte_flow.training.checkpoint.model_folder import PIPELINE_FILE, TOKENIZER_FOLDER, VLM_FOLDER, save_components
from latte_flow.training.checkpoint.store import newest_valid
from latte_flow.training.components import Components
from latte_flow.training.configs.fields import RESUME_AUTO, RESUME_NEVER, TrainingConfig
from latte_flow.training.configs.saved import CONFIG_FILE, differences, load_config, portable_config, save_config
from latte_flow.training.data.record import DataRecord
from latte_flow.training.distributed.collectives import agree, is_first_rank
from latte_flow.training.durable import PARTIAL
from latte_flow.training.errors import UserError, naming
from latte_flow.training.initial_weights import InitialWeights
from latte_flow.training.monitor.preemption import REQUEUE_FILE, STOP_FILE
from latte_flow.training.run_lock import LOCK_FILE

DATA_FILE = "data.json"
FILES = (CONFIG_FILE, DATA_FILE, STOP_FILE, REQUEUE_FILE, LOCK_FILE)
FOLDERS = (MODEL_FOLDER, CHECKPOINTS_FOLDER)
"""What a run reads and writes in its output_dir, apart from logs, which never end a run."""
MAY_BE_THERE = (STOP_FILE, REQUEUE_FILE, LOCK_FILE, CONFIG_FILE + PARTIAL)
"""Name prefixes of the files that the output_dir of a new run may already hold."""
NETWORK_FIELDS = ("model.", "vlm.", "codec.")
"""Prefixes of the fields that must match when a run starts from another run's checkpoint."""

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "added_tokens.json", "special_tokens_map.json", "chat_template*")
CODEC_FILES = ("config.json", "*.safetensors", "*.bin", "*.index.json")
MODEL_FILES = ("config.json", PIPELINE_FILE, f"{TOKENIZER_FOLDER}/*", f"{VLM_FOLDER}/*")
"""Files on record of the folders at vlm.path (pipeline.json has the fingerprint of its weights) and codec.path, and of model/."""


def check_output_dir(config: TrainingConfig) -> None:
    """Reject an output_dir that holds another run or other files, before anything is written.

    Raises:
        UserError: naming the difference and what is accepted.
    """
    folder = Path(config.output_dir)
    saved = folder / CONFIG_FILE
    for kind, names, is_right in (("file", FILES, Path.is_file), ("folder", FOLDERS, Path.is_dir)):
        for path in (folder / name for name in names):
            if os.path.lexists(path) and not is_right(path):
                raise UserError(f"output_dir: {path} is no {kind}; accepted: a {kind}, or nothing of this name")
    if (folder / EXPORT_FILE).is_file():
        raise UserError(
            f"output_dir: {folder} is a converted checkpoint; accepted: another folder, with --resume or --init_from {folder}"
        )
    if saved.is_file():
        changes = differences(load_config(saved), config)
        if changes:
            raise UserError(
                f"output_dir: {folder} holds a run with another configuration ({'; '.join(changes)}); "
                "accepted: the same values, or another output_dir"
            )
    elif folder.exists() and (
        not folder.is_dir() or any(not path.name.startswith(MAY_BE_THERE) for path in folder.iterdir())
    ):
        raise UserError(
            f"output_dir: {folder} exists and is not a training run; accepted: a new or empty folder, or the folder of a run"
        )


def find_run_id(config: TrainingConfig) -> str:
    """Return the id of the run in output_dir; a new one where there is none yet."""
    saved = Path(config.output_dir) / CONFIG_FILE
    return (load_config(saved).run_id if saved.is_file() else None) or uuid.uuid4().hex


@dataclass(frozen=True)
class Origin:
    """What a new run starts from: another run, or a universal checkpoint converted from one.

    Attributes:
        config_file: the other run's configuration.
        components: its model folder.
        checkpoints: the checkpoints that ``resume`` names, oldest first.
        exported: whether it is a universal checkpoint, which has export.json instead of a manifest.
    """

    config_file: Path
    components: Path
    checkpoints: list[Path]
    exported: bool = False

    def newest_checkpoint(self) -> Path:
        """Return the newest valid checkpoint. Collective.

        Raises:
            UserError: when all are damaged.
        """
        path = newest_valid(self.checkpoints, require_export_record if self.exported else read_manifest)
        assert path is not None, "an origin has checkpoints"
        return path


def find_origin(config: TrainingConfig) -> Origin | None:
    """Return the other run whose checkpoint, named by ``resume``, a new run starts from, or None.

    Once the run has its own checkpoint it resumes from that, because a requeued job runs the same command again.

    Raises:
        UserError: when ``resume`` names no checkpoint, a checkpoint of another network or an older checkpoint of this run, or
            when it is ``never`` and there are checkpoints.
    """
    own = list_checkpoints(Path(config.output_dir) / CHECKPOINTS_FOLDER)
    if config.resume == RESUME_AUTO or (config.resume == RESUME_NEVER and not own):
        return None
    if config.resume == RESUME_NEVER:
        raise UserError(
            f"resume: never, but {config.output_dir} has {len(own)} checkpoints, the newest {own[-1].name}; "
            "accepted: auto, or another output_dir"
        )
    path = Path(config.resume)
    named = output_dir_of(path) if STEP_FOLDER.fullmatch(path.name) else path
    if named.resolve().is_relative_to(Path(config.output_dir).resolve()) and own:
        if STEP_FOLDER.fullmatch(path.name) and path.name != own[-1].name:
            raise UserError(
                f"resume: {path} is not the newest checkpoint of output_dir ({own[-1].name}); accepted: another output_dir, "
                "which then starts from it"
            )
        return None
    if own:  # the named one may have been removed since
        return None
    origin = _find_export(path) or _find_run(path)
    if not origin.config_file.is_file():
        raise UserError(
            f"resume: {origin.config_file} not found; accepted: a checkpoint in the output_dir it was written to, or one "
            "converted from there"
        )
    theirs, ours = load_config(origin.config_file), config
    if origin.exported:  # an export has no absolute paths; the fingerprint tells whether the VLM is the same
        theirs, ours = portable_config(theirs), portable_config(ours)
    changes = [line for line in differences(theirs, ours) if line.startswith(NETWORK_FIELDS)]
    if changes:
        raise UserError(f"resume: {path} belongs to another network ({'; '.join(changes)}); accepted: the same values")
    return origin


def _find_run(path: Path) -> Origin:
    checkpoints = named_checkpoints(path)
    if not checkpoints:
        raise UserError(
            f"resume: {path} holds no checkpoint; accepted: auto, never, a training output_dir, one step's folder of it, or a "
            "deepspeed-universal checkpoint of tools/convert_checkpoint.py"
        )
    run = output_dir_of(checkpoints[0])
    return Origin(run / CONFIG_FILE, run / MODEL_FOLDER, checkpoints)


def _find_export(path: Path) -> Origin | None:
    """Return an exported folder as an origin, or None if the path is not one."""
    with naming("resume: "):
        record = read_export_record(path)
    if record is None:
        return None
    if record["format"] != UniversalSource.format or record["weights"] is not None:
        raise UserError(
            f"resume: {path} holds weights as {record['format']} and no optimizer state; accepted: --init_from {path}, which "
            f"loads the weights, or --resume with a {UniversalSource.format} checkpoint converted without --weights"
        )
    return Origin(path / CONFIG_FILE, path, [path], exported=True)


def components_folder(config: TrainingConfig, start: Origin | InitialWeights | None) -> Path:
    """Return the model folder a run is built from: its own, once complete, or that of its start."""
    own = Path(config.output_dir) / MODEL_FOLDER
    if start is None or start.components is None or (own / PIPELINE_FILE).is_file():
        return own
    return start.components


def hash_files(config: TrainingConfig, *, own: bool) -> dict[str, str]:
    """Return the SHA-256 of the files that shape the prompts, latents and samples of a run, as "codec.path/config.json".

    The decoder is among them: a change would show in the sample grids and in all samples drawn from the run.

    Args:
        config: the run.
        own: whether to return those in model/, or those at vlm.path and codec.path; the latter must have been loaded, so that
            hub ids are in the local cache.
    """
    folders: dict[str, tuple[Path, tuple[str, ...]]] = {}
    if own:
        folders[MODEL_FOLDER] = Path(config.output_dir) / MODEL_FOLDER, MODEL_FILES
    if not own and config.vlm.path is not None:
        folders["vlm.path"] = checkpoint_folder(config.vlm.path), TOKENIZER_FILES
    if not own and (path := codec_checkpoint(**asdict(config.codec))) is not None:
        folders["codec.path"] = checkpoint_folder(str(path)), CODEC_FILES
    digests = {}
    for name, (folder, patterns) in folders.items():
        for file in sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            digests[f"{name}/{file.relative_to(folder).as_posix()}"] = digest
    return digests


def check_files(config: TrainingConfig, record: DataRecord, *, own: bool) -> None:
    """Compare the files of a run that resumes with those on record. Collective: rank 0 reads them.

    Args:
        config: the run.
        record: its record; anything is accepted if it has no files.
        own: as in ``hash_files``.

    Raises:
        UserError: on every rank, when they differ.
    """
    if record.files is not None:
        record.check_files(agree(hash_files(config, own=own) if is_first_rank() else {}), own=own)


def origin_differences(config: TrainingConfig, origin: Origin, record: DataRecord) -> list[str]:
    """Return one line for each difference of a new run from the one it starts from. Collective, as ``check_files``."""
    files = agree(hash_files(config, own=False) if is_first_rank() else {})
    changes = differences(load_config(origin.config_file), config)
    return changes + record.differences_from(origin.config_file.with_name(DATA_FILE), files)


def record_start(config: TrainingConfig, record: DataRecord, step: int) -> None:
    """Write what may have changed with this start of the run: fields such as max_steps, and what it reads. Rank 0 only.

    Args:
        config: the run.
        record: its record.
        step: number of optimizer steps done.
    """
    save_config(config, Path(config.output_dir) / CONFIG_FILE)
    record.update(step, record.files or hash_files(config, own=True) | hash_files(config, own=False))


def write_components(config: TrainingConfig, components: Components, model: LatteFlowModel) -> None:
    """Write what makes the output_dir of a new run self-contained: its configuration and the model folder without weights.

    Args:
        config: the run.
        components: the components it is built from.
        model: its network; only the configuration is written.
    """
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG_FILE).exists():
        save_config(config, folder / CONFIG_FILE)
    if not (folder / MODEL_FOLDER / PIPELINE_FILE).exists():
        path, vlm_config = config.vlm.path, components.model_config.vlm_config
        image_processor = load_image_processor(path) if path else build_tiny_image_processor(vlm_config)
        save_components(
            folder / MODEL_FOLDER,
            components.model_config,
            components.pipeline_config,
            tokenizer=components.tokenizer,
            image_processor=image_processor,
            vlm=components.vlm,
        )
