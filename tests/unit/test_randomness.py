"""Counter-based randomness: Philox as published and as NumPy documents it, independent of order, well distributed."""

import itertools
import random

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from latte_flow.model.randomness import Stream, generator, permutation, standard_normal, uniform

WORDS = st.integers(0, 2**64 - 1)
STREAMS = st.sampled_from(Stream)


def philox4x64(counter: list[int], key: list[int], rounds: int = 10) -> list[int]:
    """The Philox-4x64-10 block function of Salmon et al. 2011, section 4.3."""
    low = 2**64 - 1
    for i in range(rounds):
        if i:
            key = [(key[0] + 0x9E3779B97F4A7C15) & low, (key[1] + 0xBB67AE8584CAA73B) & low]
        product_0, product_1 = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (product_1 >> 64) ^ counter[1] ^ key[0],
            product_1 & low,
            (product_0 >> 64) ^ counter[3] ^ key[1],
            product_0 & low,
        ]
    return counter


def test_block_function_above_is_the_published_one():
    """A known answer of the authors' library Random123 (kat_vectors, philox4x64 10, all zero)."""
    expected = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64([0] * 4, [0] * 2) == expected


@given(seed=WORDS, stream=STREAMS, index=WORDS)
def test_bits_are_philox_of_key_seed_stream_and_counter_index(seed, stream, index):
    """NumPy counts up before each block of four words, so the first one has 1 in the low word."""
    drawn = generator(seed, stream, index).bit_generator.random_raw(8).tolist()
    blocks = [philox4x64([block, 0, 0, index], [seed, int(stream)]) for block in (1, 2)]
    assert drawn == blocks[0] + blocks[1]


@given(seed=WORDS, stream=STREAMS, index=WORDS)
def test_equals_numpys_documented_constructor(seed, stream, index):
    """``Philox(counter, key)``: "a Python int in [0, 2**256)" and "in [0, 2**128)", least significant word first."""

    def documented() -> np.random.Generator:
        return np.random.Generator(np.random.Philox(counter=index << 192, key=seed | int(stream) << 64))

    np.testing.assert_array_equal(generator(seed, stream, index).random(5), documented().random(5))
    noise = documented().standard_normal((2, 3), dtype=np.float32)
    np.testing.assert_array_equal(standard_normal(seed, stream, index, (2, 3)), noise)
    assert uniform(seed, stream, index) == documented().random()


@given(st.lists(st.tuples(WORDS, STREAMS, WORDS), min_size=2, max_size=2, unique=True))
def test_another_seed_stream_or_index_is_another_draw(places):
    (first, second) = (standard_normal(*place, shape=(4,)) for place in places)
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("low", [2**53, 2**63, 2**64 - 2])
def test_large_neighbouring_seeds_and_indices_are_told_apart(low):
    """They are where float64 has no more room: NumPy would round them together."""
    assert uniform(low, Stream.FLIP, 0) != uniform(low + 1, Stream.FLIP, 0)
    assert uniform(0, Stream.FLIP, low) != uniform(0, Stream.FLIP, low + 1)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1), (2**64, 0), (0, 2**64)])
def test_seeds_and_indices_outside_64_bits_are_refused(seed, index):
    with pytest.raises(OverflowError):
        uniform(seed, Stream.TIMESTEP, index)


def test_streams_keep_their_numbers():
    """A run resumed by a later version must draw the same: the numbers are part of the format of a checkpoint."""
    assert {stream.name: stream.value for stream in Stream} == {
        "TRAINING_NOISE": 0,
        "TIMESTEP": 1,
        "CONDITION_DROP": 2,
        "FLIP": 3,
        "DATA_ORDER": 4,
        "SAMPLING_NOISE": 5,
        "SAMPLING_STEP_NOISE": 6,
    }


def test_draws_do_not_depend_on_their_order_or_on_each_other():
    places = list(itertools.product((0, 1), Stream, range(5)))
    in_order = {place: (uniform(*place), standard_normal(*place, shape=(3,)).tolist()) for place in places}
    random.Random(0).shuffle(places)
    np.random.seed(0)
    for place in places:
        standard_normal(*place, shape=(1000,))  # a longer draw in between
        assert (uniform(*place), standard_normal(*place, shape=(3,)).tolist()) == in_order[place]


def test_a_longer_draw_never_runs_into_the_next_index():
    """The first 4096 words at one index against those at its neighbours."""
    words = [generator(0, Stream.TRAINING_NOISE, i).bit_generator.random_raw(4096) for i in range(8)]
    assert len(np.unique(np.concatenate(words))) == 8 * 4096


@pytest.mark.parametrize("stream", Stream)
def test_uniform_is_uniform_over_indices(stream):
    draws = np.array([uniform(3, stream, index) for index in range(3000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert scipy.stats.kstest(draws, "uniform").pvalue > 0.01
    assert abs(scipy.stats.pearsonr(draws[:-1], draws[1:]).statistic) < 0.06  # neighbours; 3.3 standard deviations


def test_streams_and_seeds_are_uncorrelated():
    columns = [[uniform(seed, stream, i) for i in range(3000)] for seed in (0, 1) for stream in Stream]
    correlations = np.corrcoef(columns)[np.triu_indices(len(columns), k=1)]
    assert np.abs(correlations).max() < 0.08  # 4.4 standard deviations, over 66 pairs


def test_noise_is_standard_normal_within_and_across_samples():
    noise = np.stack([standard_normal(0, Stream.TRAINING_NOISE, i, (4, 8, 8)) for i in range(200)])
    assert noise.dtype == np.float32
    assert noise.shape == (200, 4, 8, 8)
    assert scipy.stats.kstest(noise.ravel(), "norm").pvalue > 0.01
    assert scipy.stats.kstest(noise[:, 0, 0, 0], "norm").pvalue > 0.01
    flat = noise.reshape(200, -1)
    assert np.abs(flat.mean(axis=0)).max() < 5 / 200**0.5
    assert flat.var() == pytest.approx(1, abs=5 * (2 / flat.size) ** 0.5)


@given(seed=WORDS, index=WORDS, length=st.integers(0, 50))
def test_permutation_has_every_number_once(seed, index, length):
    order = permutation(seed, Stream.DATA_ORDER, index, length)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(length))


def test_every_order_is_equally_likely_over_epochs():
    """Chi-square over the 6 orders of 3 samples."""
    orders = [tuple(permutation(0, Stream.DATA_ORDER, epoch, 3).tolist()) for epoch in range(3000)]
    counts = [orders.count(order) for order in itertools.permutations(range(3))]
    assert scipy.stats.chisquare(counts).pvalue > 0.01
