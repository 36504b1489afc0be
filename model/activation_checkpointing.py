"""Activation checkpointing (arXiv 1604.06174): keep each layer's input only, and run the layer again in the backward pass.

It is done by transformers' GradientCheckpointingLayer, from which its decoder layers and ours derive, in training mode and where
gradients are enabled.
"""

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from latte_flow.model.latte_flow import LatteFlowModel


def recomputed_layers(model: LatteFlowModel) -> list[nn.Module]:
    """Return the layers of a network that are run again: the generation layers and Blend's decoder layers.

    With ``context_projection: vlm`` not the latter: the context is their key-value cache, which a second run would extend.
    """
    layers = list(model.layers)
    if model.config.variant == "blend" and model.config.context_projection == "generation":
        layers += model.config.backbone.decoder_layers(model.vlm)
    return layers


def checkpoint_activations(model: LatteFlowModel, enabled: bool = True) -> None:
    """Set whether a network is trained with activation checkpointing. Losses and gradients are the same."""
    # Not reentrant: gradients also flow to contexts, gates and residuals, which are not positional tensors.
    # Layers draw no random numbers.
    run_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    for layer in recomputed_layers(model):
        layer.gradient_checkpointing = enabled  # type: ignore[assignment]  # torch types attributes as parameters or modules
        layer._gradient_checkpointing_func = run_again  # type: ignore[assignment]
