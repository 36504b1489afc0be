"""Sampling: seeds of images, and what a step evaluates."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from latte_flow.model.context import encode_context
from latte_flow.model.sampling import image_seeds, initial_noise, sample_latents
from tests.tiny import make_model, make_vlm, text_prompts


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

    def test_both_evaluations_of_a_heun_step_are_those_of_the_group_that_owns_it(self, vlm):
        """Two steps, two groups: the first step ends at tau = 500, below the boundary 500.5, and yet group 0 runs there."""
        model = make_model(vlm, num_groups=2)
        context = encode_context(vlm, text_prompts((3,)), "generation")
        ran = []
        for index in (0, 2):
            model.layers[index].mlp.register_forward_hook(lambda *_, i=index: ran.append(i))
        sample_latents(model, torch.zeros(1, 3, 4, 4), context, num_steps=2, solver="heun")
        assert ran == [0, 0, 2, 2]

    def test_latents_are_float32_also_from_a_bfloat16_model(self, vlm):
        model = make_model(vlm, num_groups=2).bfloat16()
        context = encode_context(vlm, text_prompts((3,)), "generation")
        latents = sample_latents(model, torch.zeros(1, 3, 4, 4), context, num_steps=2)
        assert latents.dtype == torch.float32
        assert (latents.bfloat16().float() != latents).any()  # the state is not rounded to bfloat16 at each step

    def test_gives_no_gradients(self, vlm):
        context = encode_context(vlm, text_prompts((3,)), "generation")
        assert not sample_latents(
            make_model(vlm, num_groups=1), torch.zeros(1, 3, 4, 4), context, num_steps=1
        ).requires_grad

    def test_progress_sees_every_step(self, vlm):
        seen = []

        def progress(steps):
            for step in steps:
                seen.append(step)
                yield step

        context = encode_context(vlm, text_prompts((3,)), "generation")
        sample_latents(make_model(vlm), torch.zeros(1, 3, 4, 4), context, num_steps=4, progress=progress)
        assert len(seen) == 4

    def test_noise_of_a_stochastic_solver_depends_on_the_images_seed_alone(self, vlm):
        model, context = make_model(vlm, num_groups=2), encode_context(vlm, text_prompts((3,)), "generation")

        def draw(first, count):
            seeds = image_seeds(7, first, count)
            rows = context.gather(torch.zeros(count, dtype=torch.long))
            return sample_latents(model, initial_noise(seeds, (3, 4, 4)), rows, num_steps=4, solver="sde", seeds=seeds)

        whole = draw(0, 3)
        torch.testing.assert_close(torch.cat([draw(0, 1), draw(1, 2)]), whole, rtol=1e-4, atol=1e-4)
        euler = sample_latents(model, initial_noise(image_seeds(7, 0, 1), (3, 4, 4)), context, num_steps=4)
        assert (euler - whole[:1]).abs().max() > 0.1

    def test_a_stochastic_solver_without_seeds_is_refused(self, vlm):
        context = encode_context(vlm, text_prompts((3,)), "generation")
        with pytest.raises(ValueError, match="solver: sde draws noise in every step and needs seeds"):
            sample_latents(make_model(vlm), torch.zeros(1, 3, 4, 4), context, num_steps=4, solver="sde")

    def test_fewer_steps_than_experts_are_refused_unless_allowed(self, vlm):
        model, context = make_model(vlm, num_groups=4), encode_context(vlm, text_prompts((3,)), "generation")
        with pytest.raises(
            ValueError, match="num_steps: 3 steps run 3 of the 4 experts; accepted: more steps, or allow"
        ):
            sample_latents(model, torch.zeros(1, 3, 4, 4), context, num_steps=3)
        ran = []
        for index, layer in enumerate(model.layers):
            layer.mlp.register_forward_hook(lambda *_, i=index: ran.append(i))
        sample_latents(model, torch.zeros(1, 3, 4, 4), context, num_steps=3, allow_skipped_experts=True)
        assert ran == [0, 1, 2]  # tau 1000, 666.7, 333.3

    def test_a_guidance_that_is_no_number_is_refused(self, vlm):
        context = encode_context(vlm, text_prompts((3,)), "generation")
        with pytest.raises(ValueError, match="cfg_scale: got nan; accepted: a number"):
            sample_latents(make_model(vlm), torch.zeros(1, 3, 4, 4), context, cfg_scale=math.nan)
