"""LaTtE-Flow: one model that understands images and generates them by flow matching, and its DeepSpeed training framework.

In a checkout the folders beside this one (model/, training/, tools/, ds_configs/) are reached through links, so that the import
names are those of an installed wheel without packages called ``model`` or ``tools`` on anybody's path.
"""

import importlib

__version__ = "0.1.0"

_EXPORTS = {
    "LatteFlowModel": "latte_flow.model.latte_flow",
    "LatteFlowPipeline": "latte_flow.model.pipeline",
    "load_pipeline": "latte_flow.training.checkpoint.opening",
}


def __getattr__(name: str):
    """Import a public name when it is first used: torch, diffusers and transformers take seconds."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
