"""The 2D rotary embedding against transformers' 1D one and complex rotations, and its relative-position property."""

import cmath

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from latte_flow.model.position import rotary_2d


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply with transformers' own function: [B, H, N, E]."""
    return apply_rotary_pos_emb(x, x, cos[None].to(x.dtype), sin[None].to(x.dtype))[0]


@pytest.mark.parametrize(("height", "width"), [(3, 5), (8, 8), (1, 4)])
@pytest.mark.parametrize("theta", [None, 100.0], ids=["theta 10000 by default", "theta 100"])
def test_equals_transformers_one_dimensional_rope_on_each_axis(height, width, theta):
    """Half of the dimensions are a head of size E/2 at position row, the other half one at position column.

    Dimension i pairs with i + E/2, so the row's head is [0, E/4) and [E/2, 3E/4).
    """
    size = 16
    parameters = {"rope_type": "default", "rope_theta": theta or 10000.0}
    config = LlamaConfig(hidden_size=8, num_attention_heads=1, head_dim=size // 2, rope_parameters=parameters)
    rope = LlamaRotaryEmbedding(config)
    x = draw(2, 3, height * width, size, seed=0).float()

    rotated = rotate(x, *(rotary_2d(height, width, size, theta) if theta else rotary_2d(height, width, size)))

    quarter = size // 4
    rows = torch.tensor([r for r in range(height) for _ in range(width)])
    columns = torch.tensor([c for _ in range(height) for c in range(width)])
    for axis, positions in enumerate((rows, columns)):
        first = axis * quarter
        dims = [*range(first, first + quarter), *range(first + 2 * quarter, first + 3 * quarter)]
        expected, _ = apply_rotary_pos_emb(x[..., dims], x[..., dims], *rope(x, positions[None]))
        torch.testing.assert_close(rotated[..., dims], expected, rtol=1e-5, atol=1e-5)


def test_rotates_pairs_as_complex_numbers():
    """z = x_i + i x_{i + E/2} times exp(i p theta^{-j/(E/4)}), p the row for i < E/4 and the column above."""
    height, width, size, theta = 3, 4, 12, 50.0
    x = draw(1, 1, height * width, size, seed=1)
    rotated = rotate(x, *rotary_2d(height, width, size, theta))[0, 0]
    for token in range(height * width):
        row, column = divmod(token, width)
        for i in range(size // 2):
            position, j = (row, i) if i < size // 4 else (column, i - size // 4)
            z = complex(x[0, 0, token, i], x[0, 0, token, i + size // 2])
            z *= cmath.exp(1j * position * theta ** (-j / (size / 4)))
            assert complex(rotated[token, i], rotated[token, i + size // 2]) == pytest.approx(z, abs=1e-6)


@given(
    st.tuples(st.integers(0, 31), st.integers(0, 31)),
    st.tuples(st.integers(0, 31), st.integers(0, 31)),
    st.tuples(st.integers(0, 32), st.integers(0, 32)),
)
def test_scores_depend_only_on_the_offset_of_rows_and_columns(query_at, key_at, shift):
    size, grid = 16, 64
    query, key = draw(size, seed=2), draw(size, seed=3)
    cos, sin = rotary_2d(grid, grid, size)

    def score(query_at, key_at) -> torch.Tensor:
        tokens = [row * grid + column for row, column in (query_at, key_at)]
        x = torch.stack([query, key])[None, None]
        q, k = rotate(x, cos[tokens], sin[tokens])[0, 0]
        return q @ k

    shifted = [(row + shift[0], column + shift[1]) for row, column in (query_at, key_at)]
    torch.testing.assert_close(score(query_at, key_at), score(*shifted), rtol=0, atol=1e-5)


def test_scores_tell_offsets_apart():
    """Of one vector with itself, and a row's offset from a column's: no two of the 5 x 5 offsets score alike."""
    size = 16
    x = draw(size, seed=4)
    cos, sin = rotary_2d(5, 5, size)
    rotated = rotate(x.expand(1, 1, 25, size), cos, sin)[0, 0]
    scores = (rotated @ rotated[0]).sort().values
    assert scores.diff().min() > 1e-4


def test_keeps_lengths_and_leaves_the_first_token_alone():
    x = draw(1, 2, 6 * 7, 8, seed=5)
    rotated = rotate(x, *rotary_2d(6, 7, 8))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(rotated[:, :, 0], x[:, :, 0])
    assert (rotated[:, :, 1:] - x[:, :, 1:]).norm(dim=-1).min() > 0.1


def test_a_position_turns_alike_in_grids_of_any_size():
    """Row 2, column 3 in a 4 x 4 and in a 32 x 16 image."""
    for small, large in zip(rotary_2d(4, 4, 128), rotary_2d(32, 16, 128), strict=True):
        assert torch.equal(small[2 * 4 + 3], large[2 * 16 + 3])


def test_float32_tables_of_one_row_a_token():
    for table in rotary_2d(8, 4, 128):
        assert table.shape == (32, 128)
        assert table.dtype == torch.float32


@pytest.mark.parametrize("head_dim", [2, 6, 127])
def test_a_head_that_two_axes_cannot_share_is_refused(head_dim):
    with pytest.raises(ValueError, match=rf"head_dim: {head_dim} is not a multiple of 4"):
        rotary_2d(2, 2, head_dim)
