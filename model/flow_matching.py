"""The linear flow between noise and data (paper section 2): the path, its velocity, and the two time conventions.

There are two time variables. ``t`` in [0, 1] is the flow's own: t = 0 is noise, t = 1 is data. The timestep ``tau`` in [0, 1000]
runs the other way, tau = 1000 (1 - t), so that tau = 1000 is pure noise as in diffusion models; the intervals of the
timestep experts and the time embedding are written in tau.

Shapes: B batch, ``...`` the shape of one sample.
"""

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000
"""T of the paper: tau runs over [0, T]."""


def timestep_to_time(tau: Tensor) -> Tensor:
    """Return the flow time t = 1 - tau / 1000 of a timestep tau, elementwise."""
    return 1.0 - tau / NUM_TRAIN_TIMESTEPS


def time_to_timestep(t: Tensor) -> Tensor:
    """Return the timestep tau = 1000 (1 - t) of a flow time t, elementwise."""
    return NUM_TRAIN_TIMESTEPS * (1.0 - t)


def interpolate(data: Tensor, noise: Tensor, tau: Tensor) -> Tensor:
    """Return the point x_t = t x_1 + (1 - t) x_0 of the path from noise x_0 to data x_1 (paper section 2).

    Args:
        data: x_1, [B, ...].
        noise: x_0 ~ N(0, I), the shape of ``data``.
        tau: timestep of each sample in [0, 1000], [B].
    """
    # t keeps its own precision: in bf16 the last timesteps before the data would round to t = 1.
    t = timestep_to_time(tau).view(-1, *[1] * (data.dim() - 1))
    return (t * data + (1.0 - t) * noise).to(data.dtype)


def target_velocity(data: Tensor, noise: Tensor) -> Tensor:
    """Return the path's velocity u_t = dx_t/dt = x_1 - x_0, the same at every t (paper section 2)."""
    return data - noise


def flow_matching_loss(velocity: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """Return each sample's || v - u_t ||^2 averaged over its elements, in float32 (paper Eq. 1): [B].

    Args:
        velocity: the network's prediction v, [B, ...].
        data: x_1, the shape of ``velocity``.
        noise: x_0, the shape of ``velocity``.
    """
    error = velocity.float() - target_velocity(data.float(), noise.float())
    return torch.mean(error.square().flatten(1), dim=1)
