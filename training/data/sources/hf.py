"""Any data set that ``datasets.load_dataset`` loads, from a folder or by its name on the Hugging Face hub."""

import hashlib
from pathlib import Path

from latte_flow.model.files import is_hub_id
from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.sources.arrow import ArrowSource, fingerprint
from latte_flow.training.data.sources.columns import one_line
from latte_flow.training.data.sources.table import register_source
from latte_flow.training.errors import UserError


class HuggingFaceDataset(ArrowSource):
    """One split of a data set: a folder with files of any format that ``datasets`` knows, or OWNER/NAME on the hub.

    Code that comes with a data set is never run: ``datasets`` removed that in version 4.
    """

    name = "hf"
    accepted = (
        "a folder that datasets.load_dataset loads, or OWNER/NAME on the Hugging Face hub, with one of its splits as data.split "
        "and one of its configurations as data.subset"
    )

    def exists(self, path: str) -> bool:
        """Return whether it is a path that exists, or a name on the hub: not a mistyped path, which would be looked for there."""
        return super().exists(path) or (path.count("/") == 1 and is_hub_id(path, "dataset"))

    def find_files(self, path: Path) -> list[Path]:
        """See ArrowSource. All files that are not hidden; none for a name on the hub."""
        if path.is_file() or (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            raise UserError(
                f"data.path: {path} is no folder that datasets.load_dataset loads; accepted with data.dataset hf: "
                f"{self.accepted}; for a folder of save_to_disk, data.dataset saved"
            )
        files = (file for file in sorted(path.rglob("*")) if not file.is_dir())
        return [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]

    def read(self, config: DataConfig, path: Path, files: list[Path]):
        """See ArrowSource."""
        import datasets
        from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

        local = path.exists()
        try:
            # An absolute path is never taken for the name of a format or of a repository.
            builder = datasets.load_dataset_builder(str(path.absolute() if local else path), config.subset)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"data.path: {path}: {one_line(error)}; accepted: {self.accepted}") from error
        sources = [file for part in (builder.config.data_files or {}).values() for file in part]
        if local and (remote := next((file for file in sources if "://" in file), None)):
            raise UserError(f"data.path: {path} refers to {remote}; accepted: a folder that holds its own files")
        builder.download_and_prepare()
        for split in (part.split("[")[0] for part in config.split.split("+")):
            if split not in builder.info.splits:
                raise UserError(
                    f"data.split: {split!r} is not in {path}; accepted: {', '.join(builder.info.splits)}, a part such as "
                    "train[:90%], or several joined by +"
                )
        table = builder.as_dataset(split=config.split)
        pictures = [file for file in files if file.suffix.lower() in ImageFolder.EXTENSIONS]
        content = (
            f"{fingerprint(path, pictures, ends=False)} {fingerprint(path, sorted({*files} - {*pictures}))}"
            if local
            else f"{path} {builder.hash}"  # of a name on the hub, its commit
        )
        return table, hashlib.sha256(f"{content} {config.subset} {config.split}".encode()).hexdigest()

    def suspects(self, files: list[Path]) -> list[Path]:
        """See ArrowSource. A .json file may hold one object or one per line."""
        return [file for file in files if file.suffix != ".json"]


register_source("hf")(HuggingFaceDataset().load)
