"""Files of tables: Parquet, WebDataset tars, and data sets written by ``datasets``' save_to_disk."""

import json
from pathlib import Path

from latte_flow.training.configs.fields import DataConfig
from latte_flow.training.data.sources.arrow import ArrowSource, fingerprint, no_images
from latte_flow.training.data.sources.table import register_source
from latte_flow.training.data.whole_files import STATE_FILE, check_end, check_tars
from latte_flow.training.errors import UserError


class TableFiles(ArrowSource):
    """One file, or all files of a folder with a suffix, in the order of their names."""

    suffix: str

    def recognises(self, path: Path) -> bool:
        """Return whether it is such a file, or a folder that holds one."""
        return path.suffix == self.suffix or (path.is_dir() and any(path.glob(f"**/*{self.suffix}")))

    def find_files(self, path: Path) -> list[Path]:
        """See ArrowSource."""
        files = sorted(path.glob(f"**/*{self.suffix}")) if path.is_dir() else [path]
        if not files:
            raise UserError(
                f"data.path: {path} holds no *{self.suffix} file; accepted with data.dataset {self.name}: {self.accepted}"
            )
        return files

    def read(self, config: DataConfig, path: Path, files: list[Path]):
        """See ArrowSource."""
        import datasets

        table = datasets.load_dataset(self.name, data_files=[str(file.absolute()) for file in files], split="train")
        return table, fingerprint(path, files)


class ParquetFiles(TableFiles):
    """Parquet files with an image column."""

    name, suffix, accepted = "parquet", ".parquet", "a Parquet file, or a folder of them"

    def read(self, config: DataConfig, path: Path, files: list[Path]):
        """See ArrowSource."""
        import pyarrow.parquet as pq

        if sum(pq.read_metadata(file).num_rows for file in files) == 0:
            raise no_images(path)
        return super().read(config, path, files)


class WebDatasetTars(TableFiles):
    """Tar files that hold NAME.jpg with NAME.txt or NAME.cls."""

    name, suffix, accepted = "webdataset", ".tar", "a tar file, or a folder of them"

    def read(self, config: DataConfig, path: Path, files: list[Path]):
        """See ArrowSource."""
        table, digest = super().read(config, path, files)
        check_tars(files, Path(table.cache_files[0]["filename"]).parent)
        return table, digest


class SavedDataset(ArrowSource):
    """A folder of Arrow files with state.json."""

    name, accepted = "saved", "a folder written by save_to_disk"

    def recognises(self, path: Path) -> bool:
        """Return whether save_to_disk wrote the folder."""
        return (path / STATE_FILE).is_file() or (path / "dataset_dict.json").is_file()

    def find_files(self, path: Path) -> list[Path]:
        """See ArrowSource."""
        described = [path / STATE_FILE, path / "dataset_info.json"]
        try:
            names = [entry["filename"] for entry in json.loads(described[0].read_bytes())["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError):  # datasets raises the same error later, where it is reported
            names = [file.name for file in sorted(path.glob("*.arrow"))]
        return described + [path / name for name in names]

    def read(self, config: DataConfig, path: Path, files: list[Path]):
        """See ArrowSource."""
        import datasets

        parts = [file for file in files if file.suffix == ".arrow"]
        for file in parts:
            check_end(file)
        if (path / STATE_FILE).is_file() and not parts:  # datasets writes no Arrow file for an empty data set
            raise no_images(path)
        table = datasets.load_from_disk(str(path))
        if isinstance(table, datasets.DatasetDict):
            folders = ", ".join(str(path / split) for split in table)
            raise UserError(f"data.path: {path} holds several splits; accepted: one of {folders}")
        return table, fingerprint(path, parts)


for source in (WebDatasetTars(), ParquetFiles(), SavedDataset()):  # a folder is taken for the last that recognises it
    register_source(source.name, recognises=source.recognises)(source.load)
