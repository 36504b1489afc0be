"""The captioned emoji of the shared data folder, which lies beside the repository."""

from pathlib import Path

import pytest

EMOJI = Path(__file__).parents[2] / "shared" / "data" / "emoji64" / "train.parquet"
needs_emoji = pytest.mark.skipif(not EMOJI.is_file(), reason="needs shared/data/emoji64 beside the repository")


def write_emoji(file: Path, count: int) -> Path:
    """Write the first emoji as a Parquet file of their own."""
    import datasets

    table = datasets.Dataset.from_parquet(str(EMOJI), cache_dir=str(file.parent / "cache"))
    file.parent.mkdir(parents=True, exist_ok=True)
    table.select(range(count)).to_parquet(str(file))
    return file
