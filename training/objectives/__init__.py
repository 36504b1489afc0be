"""Training objectives: what a run trains for. Importing this package registers the package's own."""

from latte_flow.training.objectives import flow_matching  # noqa: F401
