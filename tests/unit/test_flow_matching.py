"""The linear flow: its ends, its derivative, its integral and Eq. 1, in closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latte_flow.model.flow_matching import (
    flow_matching_loss,
    interpolate,
    target_velocity,
    time_to_timestep,
    timestep_to_time,
)

SHAPE = (4, 3, 2, 2)


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """Data x_1 and noise x_0."""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(SHAPE, generator=rng, dtype=torch.float64), torch.randn(
        SHAPE, generator=rng, dtype=torch.float64
    )


def test_timestep_1000_is_time_0_and_timestep_0_is_time_1():
    assert timestep_to_time(torch.tensor([1000.0, 750.0, 500.0, 0.0])).tolist() == [0, 0.25, 0.5, 1]
    assert time_to_timestep(torch.tensor([0.0, 0.25, 0.5, 1.0])).tolist() == [1000, 750, 500, 0]


@given(st.floats(0, 1000))
def test_the_two_names_of_a_time_translate_back(tau):
    tau = torch.tensor(tau, dtype=torch.float64)
    torch.testing.assert_close(time_to_timestep(timestep_to_time(tau)), tau, rtol=0, atol=1e-12 * 1000)


def test_path_starts_at_the_noise_and_ends_at_the_data(pair):
    data, noise = pair
    assert torch.equal(interpolate(data, noise, torch.full((4,), 1000.0)), noise)
    assert torch.equal(interpolate(data, noise, torch.full((4,), 0.0)), data)


def test_every_sample_has_its_own_timestep():
    """From 0 to 1 the path is at t itself; from 10 to 0 at 10 (1 - t)."""
    tau = torch.tensor([1000.0, 900.0, 250.0, 0.0], dtype=torch.float64)
    ones, zeros = torch.ones(SHAPE, dtype=torch.float64), torch.zeros(SHAPE, dtype=torch.float64)
    for i, t in enumerate((0.0, 0.1, 0.75, 1.0)):
        torch.testing.assert_close(interpolate(ones, zeros, tau)[i], t * ones[i])
        torch.testing.assert_close(interpolate(zeros, 10 * ones, tau)[i], 10 * (1 - t) * ones[i])


@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 2, 3, 4, 5)])
def test_samples_of_any_shape(shape):
    tau = torch.tensor([1000.0, 600.0, 300.0, 0.0])
    moved = interpolate(torch.ones(shape), torch.zeros(shape), tau)
    assert moved.shape == shape
    torch.testing.assert_close(moved.flatten(1).mean(1) if moved.dim() > 1 else moved, torch.tensor([0, 0.4, 0.7, 1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_path_keeps_the_datas_dtype(dtype):
    assert interpolate(torch.ones(2, 3, dtype=dtype), torch.zeros(2, 3, dtype=dtype), torch.ones(2)).dtype == dtype


def test_velocity_is_the_derivative_of_the_path_by_time(pair):
    """Finite differences: the path is linear, so a difference of any width is exact."""
    data, noise = pair
    t = torch.tensor([0.1, 0.2, 0.5, 0.7], dtype=torch.float64)
    for step in (1e-3, 0.3):
        ahead, here = (interpolate(data, noise, time_to_timestep(x)) for x in (t + step, t))
        torch.testing.assert_close((ahead - here) / step, target_velocity(data, noise), rtol=1e-9, atol=1e-9)


def test_following_the_velocity_from_the_noise_for_one_unit_of_time_reaches_the_data(pair):
    data, noise = pair
    x = noise.clone()
    for _ in range(40):
        x += target_velocity(data, noise) / 40
    torch.testing.assert_close(x, data, rtol=1e-12, atol=1e-12)


def test_loss_is_each_samples_mean_squared_error():
    """A prediction off by 0, 1, -2 and by 3 in half of the elements."""
    data, noise = torch.full(SHAPE, 5.0), torch.full(SHAPE, 2.0)
    off = torch.zeros(SHAPE)
    off[1], off[2], off[3, :, 0] = 1, -2, 3
    loss = flow_matching_loss(3 + off, data, noise)
    assert loss.tolist() == [0, 1, 4, 4.5]
    assert loss.dtype == torch.float32


def test_loss_gradient_is_twice_the_error_over_the_number_of_elements(pair):
    data, noise = (x.float() for x in pair)
    velocity = torch.zeros(SHAPE, requires_grad=True)
    flow_matching_loss(velocity, data, noise).sum().backward()
    torch.testing.assert_close(velocity.grad, 2 * (noise - data) / (3 * 2 * 2))


def test_loss_of_bfloat16_predictions_is_computed_in_float32():
    """256 + 1 is not a bfloat16 number: the difference of the data and the noise would lose the 1."""
    shape = (1, 4096)
    data, noise = torch.full(shape, 256.0, dtype=torch.bfloat16), torch.full(shape, -1.0, dtype=torch.bfloat16)
    loss = flow_matching_loss(torch.full(shape, 256.0, dtype=torch.bfloat16), data, noise)
    assert loss.dtype == torch.float32
    assert loss.item() == 1


def test_the_best_constant_prediction_is_the_mean_velocity():
    """The minimiser of Eq. 1 over predictions that see nothing is E[x_1 - x_0] (here the data's mean, 2)."""
    rng = torch.Generator().manual_seed(1)
    data, noise = 2 + torch.randn(20000, 1, generator=rng), torch.randn(20000, 1, generator=rng)

    def loss(guess: float) -> float:
        return flow_matching_loss(torch.full_like(data, guess), data, noise).mean().item()

    assert loss(2.0) < min(loss(1.9), loss(2.1))
    assert loss(2.0) == pytest.approx(2.0, rel=0.05)  # Var[x_1] + Var[x_0]
