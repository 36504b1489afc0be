"""AdamW with an exponential moving average (EMA) of the weights, and its parameter groups.

DeepSpeed ZeRO gives the optimizer this rank's flat shard of the float32 master weights. The average is one more state tensor of
AdamW and therefore a shard of the same shape: it costs 4 bytes per parameter divided by the world size, and DeepSpeed saves,
loads, re-partitions and offloads it with the moments. A step that DeepSpeed skips does not update the average either.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import nn

from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.training.configs.fields import OptimizerConfig
from latte_flow.training.distributed.zero import master_shards, refresh_model_weights

EMA_KEY = "ema"
"""Name of the average in the optimizer's state, beside exp_avg and exp_avg_sq."""
BYTES_PER_PARAMETER = 16
"""Of the float32 master weight, AdamW's two moments and the average of a trained parameter; sharded over the ranks."""


class AdamWWithEMA(torch.optim.AdamW):
    """torch's AdamW that also averages the parameters it updates.

    After update n = 1, 2, ...: ema += (1 - d_n) (p - ema), d_n = min(decay, (1 + n) / (10 + n)). The smaller decay of early
    steps makes the average forget the random initial weights.

    Args:
        params: parameter groups, as for AdamW.
        ema_decay: upper limit of d_n; with 0 the average equals the weights.
        kwargs: passed to AdamW.
    """

    def __init__(self, params: Any, *, ema_decay: float, **kwargs: Any):
        super().__init__(params, **kwargs)
        self.ema_decay = ema_decay

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if EMA_KEY not in state:
                    # n = 1 would keep only 2/11 of the initial weights: starting at the first updated weights loses nothing.
                    state[EMA_KEY] = parameter.detach().clone(memory_format=torch.preserve_format)
                    continue
                # "step" is a tensor that may be on the device: arithmetic on it needs no host synchronisation.
                n = state["step"]
                decay = torch.clamp((1 + n) / (10 + n), max=self.ema_decay)
                state[EMA_KEY].lerp_(parameter, (1 - decay).to(parameter.device, parameter.dtype))
        return loss


@contextmanager
def ema_weights(engine: deepspeed.DeepSpeedEngine) -> Iterator[None]:
    """Run the body with the averaged weights in the model, then restore the trained weights bit-exactly.

    Every rank swaps its shard of the master weights with its shard of the average, and DeepSpeed gathers the model's weights from
    the shards as after an optimizer step. Before the first step there is no average and the body runs with the trained weights.

    Args:
        engine: a DeepSpeed engine with ZeRO over an AdamWWithEMA.
    """
    zero = engine.optimizer
    shards = [p for p in master_shards(zero) if EMA_KEY in zero.optimizer.state.get(p, {})]
    if not shards:
        yield
        return

    def swap() -> None:
        for shard in shards:
            average = zero.optimizer.state[shard][EMA_KEY]
            trained = shard.data.clone()
            shard.data.copy_(average)
            average.copy_(trained)
        refresh_model_weights(zero)

    swap()
    try:
        yield
    finally:
        swap()


def parameter_groups(model: LatteFlowModel, weight_decay: float) -> list[dict]:
    """Return the trained parameters as optimizer groups: one per timestep expert, one for image_io, one for the VLM.

    Each is split by weight decay: norms, biases, modulation and residual gates have none (paper section 6), nor embeddings: the
    rows of tokens that no prompt uses get no gradient and would only shrink. The gradient norm of a group is reported under its
    ``name``.
    """
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part, index, *_ = name.split(".")
        if part == "layers":
            label = f"group_{model.experts.group_of_layer(int(index))}"
        else:
            label = {"image_io": "image_io", "vlm": "vlm"}[part]
        decays = parameter.dim() > 1 and "modulation" not in name and "residual_gate" not in name
        decays = decays and id(parameter) not in embeddings
        groups.setdefault((label, decays), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "name": label}
        for (label, decays), parameters in groups.items()
    ]


def build_optimizer(model: LatteFlowModel, config: OptimizerConfig) -> AdamWWithEMA:
    """Return the optimizer of a network's trained parameters, grouped by ``parameter_groups``."""
    return AdamWWithEMA(
        parameter_groups(model, config.weight_decay),
        ema_decay=config.ema_decay,
        lr=config.lr,
        betas=tuple(config.betas),
        fused=True,
    )


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Return the learning rate of the update that follows ``step`` updates: linear warm-up, then constant."""
    return config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))
