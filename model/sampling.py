"""Sampling: a solver (solvers.py) takes noise to data along a time grid (time_grids.py) (paper sections 2, 3 and 7).

``sample_latents`` gives it the velocity of a LatteFlowModel: strict experts (each step runs the one group that owns its first
timestep), classifier-free guidance as one doubled batch, and the context's keys and values projected once.

Shapes: B images, C latent channels, (H, W) latent size.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from latte_flow.model.context import Context
from latte_flow.model.errors import ArgumentError
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.randomness import Stream, standard_normal
from latte_flow.model.solvers import integrate
from latte_flow.model.time_grids import make_timesteps


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Return x ~ N(0, I) of each image, [B, *shape] float32 on the CPU; image i depends on seeds[i] alone."""
    return torch.from_numpy(np.stack([standard_normal(seed, Stream.SAMPLING_NOISE, 0, shape) for seed in seeds]))


def image_seeds(seed: int, first: int, count: int) -> list[int]:
    """Return the seeds of images first .. first + count - 1 of a run: the i-th image of a run depends on (seed, i) alone.

    Raises:
        ArgumentError: when the seed is not a 32-bit unsigned integer.
    """
    if not 0 <= seed < 2**32:
        raise ArgumentError(f"seed: got {seed}; accepted: 0 to 2^32 - 1")
    return [seed * 2**32 + i for i in range(first, first + count)]


@torch.inference_mode()
def sample_latents(
    model: LatteFlowModel,
    noise: Tensor,
    context: Context,
    null_context: Context | None = None,
    *,
    num_steps: int = 40,
    cfg_scale: float = 1.0,
    solver: str = "euler",
    time_grid: str = "uniform",
    shift: float | None = None,
    timesteps: Sequence[float] | None = None,
    align_to_experts: bool = False,
    allow_skipped_experts: bool = False,
    seeds: Sequence[int] | None = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Tensor:
    """Turn noise into latents.

    Args:
        model: the network, on any device.
        noise: x at t = 0, [B, C, H, W].
        context: the context of each image's prompt, B rows, every layer.
        null_context: the context of the null prompt, B rows or one; needed when cfg_scale is not 1.
        num_steps, time_grid, shift, timesteps, align_to_experts, allow_skipped_experts: see time_grids.make_timesteps.
        cfg_scale: s of v = v_null + s (v_cond - v_null); 1 is no guidance and costs half (paper: 5).
        solver: a key of ``solvers.SOLVERS``.
        seeds: one per image, for solvers that draw noise.
        progress: wraps the iterable of steps, e.g. tqdm.

    Returns:
        Latents [B, C, H, W], float32, on the model's device.

    Raises:
        ArgumentError: when guidance is asked for without a null context, or an argument is invalid; the message names it.
    """
    if math.isnan(cfg_scale):
        raise ArgumentError("cfg_scale: got nan; accepted: a number")
    device = model.device
    guided = cfg_scale != 1.0
    context = context.to(device)
    if guided:
        if null_context is None:
            raise ArgumentError("cfg_scale: guidance needs the null prompt's context")
        null_context = null_context.to(device)
        if len(null_context.mask) == 1:
            null_context = null_context.gather(torch.zeros(len(noise), dtype=torch.long, device=device))
        context = context.concatenate(null_context)
    key_values = model.project_context(context)

    def velocity(x: Tensor, tau: float, group: int) -> Tensor:
        batch = torch.cat([x, x]) if guided else x
        timesteps = torch.full((len(batch),), tau, device=device)
        v = model.forward_group(batch, timesteps, key_values, group)[0].float()
        if guided:
            conditional, null = v.chunk(2)
            v = null + cfg_scale * (conditional - null)
        return v

    def step_noise(index: int) -> Tensor:
        assert seeds is not None
        shape = tuple(noise.shape[1:])
        draws = [standard_normal(seed, Stream.SAMPLING_STEP_NOISE, index, shape) for seed in seeds]
        return torch.from_numpy(np.stack(draws)).to(device)

    grid = make_timesteps(
        model.experts,
        model.config.num_image_tokens,
        num_steps=num_steps,
        time_grid=time_grid,
        shift=shift,
        timesteps=timesteps,
        align_to_experts=align_to_experts,
        allow_skipped_experts=allow_skipped_experts,
    )
    draw = None if seeds is None else step_noise
    x = noise.to(device).float()
    return integrate(velocity, x, grid, solver, owner=model.experts.owner, noise=draw, progress=progress)
