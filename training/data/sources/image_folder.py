"""Folders of images: one folder per class, or pictures with a metadata file of captions."""

import logging
import os
from pathlib import Path

from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.sources.arrow import ArrowSource, fingerprint
from latte_flow.training.data.sources.columns import one_line
from latte_flow.training.data.sources.table import register_source
from latte_flow.training.data.whole_files import damaged_file
from latte_flow.training.errors import UserError

logger = logging.getLogger(__name__)


class ImageFolder(ArrowSource):
    """Pictures in folders, in the order of their names."""

    name, accepted = "imagefolder", "a folder of images"

    def find_files(self, path: Path) -> list[Path]:
        """See ArrowSource."""
        if not path.is_dir():
            raise UserError(
                f"data.path: {path} is not a folder; accepted with data.dataset imagefolder: a folder of images"
            )

        # Classes are numbered by name: a folder that is left out silently would shift the labels of all that follow.
        def unreadable(error: OSError) -> None:
            if not _is_ignored(Path(error.filename), path):
                raise UserError(
                    f"data.path: {error.filename} cannot be listed: {error.strerror}; accepted: readable folders"
                ) from error

        seen: dict[str, str] = {}
        files: list[Path] = []
        for folder, folders, names in os.walk(path, onerror=unreadable, followlinks=True):
            # A link that is followed becomes a class, also one with a name that datasets ignores.
            links = [Path(folder, name) for name in folders if os.path.islink(Path(folder, name))]
            folders[:] = sorted(set(folders) - {link.name for link in links if _is_ignored(link, path)})
            real = os.path.realpath(folder)
            if real in seen:
                raise UserError(f"data.path: {folder} and {seen[real]} are the same folder; accepted: each folder once")
            seen[real] = folder
            if not names and not folders and not _is_ignored(Path(folder), path):
                logger.warning("%s is empty: it is not one of the classes", folder)
            files += [Path(folder, name) for name in names]
        return files

    def read(self, config: DataConfig, path: Path, files: list[Path]):
        """See ArrowSource."""
        import datasets

        # As one split: with data_dir alone, folders named train or test would be treated as splits. "**" follows no links.
        folders = {folder for file in files for folder in file.parents if path in folder.parents}
        roots = [path, *sorted(folder for folder in folders if folder.is_symlink())]
        patterns = {"train": [f"{root.absolute()}/**" for root in roots]}
        try:
            table = datasets.load_dataset("imagefolder", data_files=patterns, split="train")
        except (datasets.data_files.EmptyDatasetError, FileNotFoundError, ValueError) as error:
            if damaged_file(self.suspects(files)):
                raise
            raise UserError(
                f"data.path: {path} holds zero images; at least one is needed ({one_line(error)})"
            ) from error
        if isinstance(label := table.features.get("label"), datasets.ClassLabel):
            _report_folders_without_pictures(path, files, label.names)
        return table, fingerprint(path, files, ends=False)

    def suspects(self, files: list[Path]) -> list[Path]:
        """See ArrowSource. Pictures only need to exist here; undecodable ones are handled when they are drawn."""
        missing = [file for file in files if not file.exists()]
        return [*missing[:1], *(file for file in files if file.name.startswith("metadata."))]


register_source("imagefolder")(ImageFolder().load)


def _is_ignored(folder: Path, root: Path) -> bool:
    """Return whether datasets ignores a folder because of its name or one above it, or the file system made it."""
    return any(part.startswith((".", "__")) or part == "lost+found" for part in folder.relative_to(root).parts)


def _report_folders_without_pictures(root: Path, files: list[Path], class_names: list[str]) -> None:
    """Log folders that look like classes but hold only other files, such as an archive that was not extracted."""
    folders = {file.parent for file in files}
    inner = {parent for folder in folders for parent in folder.parents}
    for folder in sorted(folders - inner - {root}):
        if folder.name not in class_names and not _is_ignored(folder, root):
            logger.warning("%s holds no picture: it is not one of the classes", folder)
