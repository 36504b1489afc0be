"""Settings of every test: one torch thread, reproducible property tests, GPU tests only where there is a GPU."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# The same examples in every run, and no limit on an example's duration: a shared machine must not decide a result.
settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
settings.load_profile("reproducible")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is false")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
