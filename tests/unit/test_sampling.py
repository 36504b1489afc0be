"""Sampling: solvers against a flow with a known map, seeds of images, what a step evaluates."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from latte_flow.model.context import encode_context
from latte_flow.model.sampling import image_seeds, initial_noise, integrate, sample_latents, uniform_times
from tests.tiny import make_model, make_vlm, text_prompts

MEAN, STD = 2.0, 0.3


def gaussian_velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """E[x_1 - x_0 | x_t = x] of x_t = t x_1 + (1 - t) x_0 with independent x_0 ~ N(0, 1), x_1 ~ N(MEAN, STD^2).

    x_1 - x_0 and x_t are jointly normal: the conditional mean is linear in x.
    """
    variance = (t * STD) ** 2 + (1 - t) ** 2
    return MEAN + (t * STD**2 - (1 - t)) / variance * (x - t * MEAN)


def error(solver: str, num_steps: int) -> float:
    """The largest distance from the exact flow map x_0 -> MEAN + STD x_0."""
    x = torch.linspace(-3, 3, 31, dtype=torch.float64)
    return (integrate(gaussian_velocity, x, uniform_times(num_steps), solver) - (MEAN + STD * x)).abs().max().item()


class TestSolvers:
    @pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
    def test_converges_to_the_exact_flow_with_its_order(self, solver, order):
        steps = np.array([160, 320, 640, 1280])
        errors = np.array([error(solver, n) for n in steps])
        slope = scipy.stats.linregress(np.log(steps), np.log(errors)).slope
        assert slope == pytest.approx(-order, abs=0.06)
        assert errors[-1] < {"euler": 3e-3, "heun": 2e-5}[solver]

    def test_forty_steps_are_near_the_flow(self):
        """What the paper's number of steps costs in accuracy on this flow."""
        assert error("heun", 40) < error("euler", 40) < 0.1

    @pytest.mark.parametrize("solver", ["euler", "heun"])
    def test_a_constant_velocity_is_integrated_exactly(self, solver):
        x = integrate(lambda x, t: torch.full_like(x, 3.0), torch.zeros(4), uniform_times(7), solver)
        torch.testing.assert_close(x, torch.full((4,), 3.0))

    def test_euler_and_heun_on_exponential_growth(self):
        """dx/dt = x: each step multiplies by 1 + h, or by 1 + h + h^2 / 2."""
        start = torch.ones(1, dtype=torch.float64)
        for solver, factor in (("euler", 1.1), ("heun", 1.105)):
            x = integrate(lambda x, t: x, start, uniform_times(10), solver)
            assert x.item() == pytest.approx(factor**10, rel=1e-12)

    def test_any_ascending_grid(self):
        """dx/dt = 2t on an uneven grid: Euler is the left Riemann sum, Heun the trapezoidal rule, exact here."""
        times = [0.0, 0.1, 0.5, 0.6, 1.0]
        euler = integrate(lambda x, t: torch.full_like(x, 2 * t), torch.zeros(1), times, "euler")
        assert euler.item() == pytest.approx(0.4 * 0.2 + 0.1 * 1.0 + 0.4 * 1.2)
        assert integrate(lambda x, t: torch.full_like(x, 2 * t), torch.zeros(1), times, "heun").item() == pytest.approx(
            1
        )

    @pytest.mark.parametrize(("solver", "evaluations"), [("euler", 1), ("heun", 2)])
    def test_number_and_places_of_evaluations(self, solver, evaluations):
        seen = []
        integrate(lambda x, t: seen.append(t) or x, torch.ones(1), uniform_times(5), solver)
        starts = [0.0, 0.2, 0.4, 0.6, 0.8]
        if evaluations == 1:
            assert seen == pytest.approx(starts)
        else:
            assert seen[0::2] == pytest.approx(starts)
            assert seen[1::2] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
        assert len(seen) == 5 * evaluations

    def test_leaves_its_input_alone(self):
        x = torch.ones(3)
        integrate(lambda x, t: x, x, uniform_times(3))
        assert torch.equal(x, torch.ones(3))

    def test_an_unknown_solver_names_the_accepted_ones(self):
        with pytest.raises(ValueError, match="solver: 'rk4' is unknown; accepted values: euler, heun"):
            integrate(gaussian_velocity, torch.zeros(1), [0.0, 1.0], "rk4")


class TestUniformTimes:
    @given(st.integers(1, 2000))
    def test_are_linspace(self, num_steps):
        np.testing.assert_allclose(uniform_times(num_steps), np.linspace(0, 1, num_steps + 1), rtol=1e-12)
        assert uniform_times(num_steps)[-1] == 1

    @pytest.mark.parametrize("num_steps", [0, -3])
    def test_less_than_one_step_is_refused(self, num_steps):
        with pytest.raises(ValueError, match=f"num_steps: got {num_steps}; accepted: 1 or more"):
            uniform_times(num_steps)


class TestSeeds:
    @given(st.integers(0, 2**32 - 1), st.integers(0, 10**6), st.integers(0, 20), st.integers(0, 20))
    def test_image_i_has_the_same_seed_whatever_the_batches(self, seed, first, size, more):
        whole = image_seeds(seed, first, size + more)
        assert whole == image_seeds(seed, first, size) + image_seeds(seed, first + size, more)
        assert len(set(whole)) == size + more

    @given(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)), unique=True, max_size=10))
    def test_no_two_images_of_any_two_runs_share_a_seed(self, places):
        seeds = [image_seeds(seed, i, 1)[0] for seed, i in places]
        assert len(set(seeds)) == len(places)
        assert all(0 <= s < 2**64 for s in seeds)

    @pytest.mark.parametrize("seed", [-1, 2**32])
    def test_a_seed_outside_32_bits_is_refused(self, seed):
        with pytest.raises(ValueError, match=rf"seed: got {seed}; accepted: 0 to 2\^32 - 1"):
            image_seeds(seed, 0, 1)

    def test_noise_of_an_image_depends_on_its_seed_alone(self):
        together = initial_noise(image_seeds(3, 0, 6), (2, 4, 4))
        apart = torch.cat([initial_noise(image_seeds(3, i, 1), (2, 4, 4)) for i in range(6)])
        assert together.dtype == torch.float32
        assert torch.equal(together, apart)
        assert len(together.unique()) == together.numel()

    def test_noise_is_standard_normal(self):
        noise = initial_noise(image_seeds(0, 0, 500), (1, 8, 8)).numpy()
        assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 0.01
        assert np.abs(noise.mean(axis=0)).max() < 5 / math.sqrt(500)

    @pytest.mark.parametrize("batch_size", [1, 2, 5])
    def test_image_i_is_the_same_picture_in_any_batch(self, batch_size):
        """Up to the rounding of a GEMM, whose order of sums depends on the batch's size."""
        vlm = make_vlm(4)
        model = make_model(vlm, num_groups=2)
        context, null = (encode_context(vlm, text_prompts(n), "generation") for n in ((6, 3), (4,)))
        rows, shape = torch.tensor([0, 1, 0, 1, 0]), (3, 4, 4)

        def sample(first, count):
            images = slice(first, first + count)
            return sample_latents(
                model,
                initial_noise(image_seeds(7, first, count), shape),
                context.gather(rows[images]),
                null,
                num_steps=4,
                cfg_scale=2.0,
            )

        whole = sample(0, 5)
        parts = torch.cat([sample(i, min(batch_size, 5 - i)) for i in range(0, 5, batch_size)])
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
        assert (whole[0] - whole[2]).abs().max() > 0.1  # the same prompt, another seed


class TestSampleLatents:
    @pytest.fixture(scope="class")
    @classmethod
    def vlm(cls):
        return make_vlm(4)

    def test_heun_takes_each_evaluation_from_the_group_that_owns_its_timestep(self, vlm):
        """Two steps, two groups: at t = 0.5 tau is 500, below the boundary 500.5, so the second evaluation is group 1's."""
        model = make_model(vlm, num_groups=2)
        context = encode_context(vlm, text_prompts((3,)), "generation")
        ran = []
        for index in (0, 2):
            model.layers[index].mlp.register_forward_hook(lambda *_, i=index: ran.append(i))
        sample_latents(model, torch.zeros(1, 3, 4, 4), context, num_steps=2, solver="heun")
        assert ran == [0, 2, 2, 2]

    def test_latents_are_float32_also_from_a_bfloat16_model(self, vlm):
        model = make_model(vlm, num_groups=2).bfloat16()
        context = encode_context(vlm, text_prompts((3,)), "generation")
        latents = sample_latents(model, torch.zeros(1, 3, 4, 4), context, num_steps=2)
        assert latents.dtype == torch.float32
        assert (latents.bfloat16().float() != latents).any()  # the state is not rounded to bfloat16 at each step

    def test_gives_no_gradients(self, vlm):
        context = encode_context(vlm, text_prompts((3,)), "generation")
        assert not sample_latents(make_model(vlm), torch.zeros(1, 3, 4, 4), context, num_steps=1).requires_grad

    def test_progress_sees_every_step(self, vlm):
        seen = []

        def progress(steps):
            for step in steps:
                seen.append(step)
                yield step

        context = encode_context(vlm, text_prompts((3,)), "generation")
        sample_latents(make_model(vlm), torch.zeros(1, 3, 4, 4), context, num_steps=3, progress=progress)
        assert len(seen) == 3
