"""Sampling: integrate dx = v dt from noise at t = 0 to data at t = 1 (paper sections 2, 3 and 7).

``integrate`` knows nothing of networks; ``sample_latents`` gives it the velocity of a LatteFlowModel: strict experts (each
evaluation runs the one group that owns its timestep), classifier-free guidance as one doubled batch, and the context's keys and
values projected once.

Shapes: B images, C latent channels, (H, W) latent size.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from latte_flow.model.context import Context
from latte_flow.model.flow_matching import NUM_TRAIN_TIMESTEPS
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.randomness import Stream, standard_normal

SOLVERS = ("euler", "heun")


def uniform_times(num_steps: int) -> list[float]:
    """Return the num_steps + 1 uniformly spaced times from t = 0 to t = 1.

    Raises:
        ValueError: when num_steps is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}; accepted: 1 or more")
    return [i / num_steps for i in range(num_steps + 1)]


def integrate(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    times: Sequence[float],
    solver: str = "euler",
    progress: Callable[[Iterable], Iterable] = iter,
) -> Tensor:
    """Integrate dx/dt = velocity(x, t) along a grid of times.

    Args:
        velocity: a function of x and of the time t, a Python number, so that choosing an expert needs no device read.
        x: the state at times[0].
        times: the grid, ascending.
        solver: ``euler``, first order, one evaluation a step; ``heun``, second order, two (the trapezoidal rule).
        progress: wraps the iterable of steps, e.g. tqdm.

    Returns:
        The state at times[-1].

    Raises:
        ValueError: when the solver is unknown.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver: {solver!r} is unknown; accepted values: {', '.join(SOLVERS)}")
    for t, t_next in progress(list(itertools.pairwise(times))):
        dt = t_next - t
        slope = velocity(x, t)
        if solver == "heun":
            slope = (slope + velocity(x + dt * slope, t_next)) / 2
        x = x + dt * slope
    return x


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Return x ~ N(0, I) of each image, [B, *shape] float32 on the CPU; image i depends on seeds[i] alone."""
    return torch.from_numpy(np.stack([standard_normal(seed, Stream.SAMPLING_NOISE, 0, shape) for seed in seeds]))


def image_seeds(seed: int, first: int, count: int) -> list[int]:
    """Return the seeds of images first .. first + count - 1 of a run: the i-th image of a run depends on (seed, i) alone.

    Raises:
        ValueError: when the seed is not a 32-bit unsigned integer.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}; accepted: 0 to 2^32 - 1")
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
    progress: Callable[[Iterable], Iterable] = iter,
) -> Tensor:
    """Turn noise into latents.

    Args:
        model: the network, on any device.
        noise: x at t = 0, [B, C, H, W].
        context: the context of each image's prompt, B rows, every layer.
        null_context: the context of the null prompt, B rows or one; needed when cfg_scale is not 1.
        num_steps: steps of the integration (paper: 40).
        cfg_scale: s of v = v_null + s (v_cond - v_null); 1 is no guidance and costs half (paper: 5).
        solver: ``euler`` or ``heun``.
        progress: wraps the iterable of steps, e.g. tqdm.

    Returns:
        Latents [B, C, H, W], float32, on the model's device.

    Raises:
        ValueError: when guidance is asked for without a null context.
    """
    device = model.device
    guided = cfg_scale != 1.0
    context = context.to(device)
    if guided:
        if null_context is None:
            raise ValueError("cfg_scale: guidance needs the null prompt's context")
        null_context = null_context.to(device)
        if len(null_context.mask) == 1:
            null_context = null_context.gather(torch.zeros(len(noise), dtype=torch.long, device=device))
        context = context.concatenate(null_context)
    key_values = model.project_context(context)

    def velocity(x: Tensor, t: float) -> Tensor:
        tau = NUM_TRAIN_TIMESTEPS * (1.0 - t)
        group = model.experts.owner(tau)
        batch = torch.cat([x, x]) if guided else x
        timesteps = torch.full((len(batch),), tau, device=device)
        v = model.forward_group(batch, timesteps, key_values, group)[0].float()
        if guided:
            conditional, null = v.chunk(2)
            v = null + cfg_scale * (conditional - null)
        return v

    return integrate(velocity, noise.to(device).float(), uniform_times(num_steps), solver, progress)
