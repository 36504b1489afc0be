"""Settings of every test: one torch thread, reproducible property tests, GPU tests only where there is a GPU, tests by tier."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The same examples in every run, and no limit on an example's duration: a shared machine must not decide a result.
settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
settings.load_profile("reproducible")


LONGEST = ("test_digits_quality.py", "test_train.py", "faults", "packaging", "integration", "test_docs_train.py")
"""Files or folders that launch/run_tests.sh starts first, so that no process is left with one of them at the end. The two files
of tests/slurm lie apart: only one at a time may use the machine's SLURM."""

SLOW_FOLDERS = {"integration", "slurm", "faults", "golden", "gpu", "packaging"}
"""Their tests start processes or train; unit tests that take seconds carry the mark themselves."""
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: min(
            [i for i, name in enumerate(LONGEST) if name in item.path.relative_to(TESTS).parts], default=len(LONGEST)
        )
    )
    for item in items:
        if not SLOW_FOLDERS.isdisjoint(item.path.relative_to(TESTS).parts):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is false")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(scope="module")
def own_datasets_cache(tmp_path_factory):
    """Keep what ``datasets`` caches out of the user's cache."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield
