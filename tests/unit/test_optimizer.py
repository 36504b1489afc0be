"""AdamW with a moving average: torch's own AdamW bit for bit, and the average in closed form."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.swa_utils import AveragedModel

from latte_flow.training.optimizer import EMA_KEY, AdamWWithEMA, parameter_groups
from tests.tiny import make_model, make_vlm

ARGUMENTS = {"lr": 0.03, "betas": (0.9, 0.95), "weight_decay": 0.1}


def parameters(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=rng, dtype=dtype)) for shape in ((4, 3), (5,))]


def set_gradients(params, step: int) -> None:
    rng = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=rng, dtype=p.dtype)


def decay_of(n: int, decay: float) -> float:
    return min(decay, (1 + n) / (10 + n))


@pytest.mark.parametrize("fused", [False, True])
def test_updates_are_torchs_adamws_bit_for_bit(fused):
    ours, theirs = parameters(), parameters()
    average = AdamWWithEMA(ours, ema_decay=0.9, fused=fused, **ARGUMENTS)
    plain = torch.optim.AdamW(theirs, fused=fused, **ARGUMENTS)
    for step in range(20):
        for params in (ours, theirs):
            set_gradients(params, step)
        for optimizer in (average, plain):
            optimizer.param_groups[0]["lr"] = 0.03 / (1 + step)  # a schedule
            optimizer.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q)
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(average.state[p][key], plain.state[q][key])


@settings(max_examples=20)
@given(st.floats(0, 0.9999), st.integers(1, 40))
def test_average_is_the_documented_weighted_sum(decay, steps):
    """Each update's weights count (1 - d_n) times all later d's; the first, with nothing before it, counts one."""
    params = parameters(dtype=torch.float64)
    optimizer = AdamWWithEMA(params, ema_decay=decay, **ARGUMENTS)
    history = []
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
        history.append([p.detach().clone().numpy() for p in params])
    shares = np.array([1.0 if n == 1 else 1 - decay_of(n, decay) for n in range(1, steps + 1)])
    for n in range(2, steps + 1):
        shares[: n - 1] *= decay_of(n, decay)
    assert shares.sum() == pytest.approx(1)
    for i, p in enumerate(params):
        expected = sum(share * weights[i] for share, weights in zip(shares, history, strict=True))
        # d_n is computed in float32, the type of AdamW's step counter
        np.testing.assert_allclose(optimizer.state[p][EMA_KEY].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_equals_torchs_averaged_model_with_the_same_decays():
    model = torch.nn.Linear(3, 2)
    averaged = AveragedModel(
        copy.deepcopy(model), avg_fn=lambda old, new, n: old + (1 - decay_of(int(n) + 1, 0.6)) * (new - old)
    )
    optimizer = AdamWWithEMA(model.parameters(), ema_decay=0.6, **ARGUMENTS)
    for step in range(30):
        set_gradients(list(model.parameters()), step)
        optimizer.step()
        averaged.update_parameters(model)
    for ours, theirs in zip(model.parameters(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[ours][EMA_KEY], theirs.detach(), rtol=1e-5, atol=1e-6)


def test_decay_zero_is_the_weights_themselves():
    params = parameters()
    optimizer = AdamWWithEMA(params, ema_decay=0.0, **ARGUMENTS)
    for step in range(5):
        set_gradients(params, step)
        optimizer.step()
        for p in params:
            torch.testing.assert_close(optimizer.state[p][EMA_KEY], p.detach())


def test_initial_weights_are_forgotten():
    """From weights of 1000 that jump to 0 at the first update, the average never sees 1000."""
    p = torch.nn.Parameter(torch.full((1,), 1000.0))
    optimizer = AdamWWithEMA([p], ema_decay=0.9999, lr=1000.0, weight_decay=0.0)
    p.grad = torch.ones(1)
    optimizer.step()
    assert optimizer.state[p][EMA_KEY].abs().item() < 1e-3


def test_a_parameter_without_gradient_keeps_its_average():
    params = parameters()
    optimizer = AdamWWithEMA(params, ema_decay=0.9, **ARGUMENTS)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    before = [optimizer.state[p][EMA_KEY].clone() for p in params]
    set_gradients(params, 3)
    params[1].grad = None
    optimizer.step()
    assert not torch.equal(optimizer.state[params[0]][EMA_KEY], before[0])
    assert torch.equal(optimizer.state[params[1]][EMA_KEY], before[1])


def test_the_average_has_its_own_memory():
    params = parameters()
    optimizer = AdamWWithEMA(params, ema_decay=0.9, **ARGUMENTS)
    set_gradients(params, 0)
    optimizer.step()
    kept = optimizer.state[params[0]][EMA_KEY].clone()
    params[0].data.add_(1)
    assert torch.equal(optimizer.state[params[0]][EMA_KEY], kept)


def test_closure_is_called_once_and_its_loss_returned():
    params = parameters()
    optimizer = AdamWWithEMA(params, ema_decay=0.9, **ARGUMENTS)
    losses = []

    def closure():
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        losses.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == losses[0]
    assert len(losses) == 1


def test_saved_and_loaded_it_goes_on_as_if_never_stopped():
    straight, first = parameters(), parameters()
    optimizer = AdamWWithEMA(straight, ema_decay=0.9, **ARGUMENTS)
    stopped = AdamWWithEMA(first, ema_decay=0.9, **ARGUMENTS)
    for step in range(10):
        if step == 5:
            state = copy.deepcopy(stopped.state_dict())
            first = [torch.nn.Parameter(p.detach().clone()) for p in first]
            stopped = AdamWWithEMA(first, ema_decay=0.9, **ARGUMENTS)
            stopped.load_state_dict(state)
        for params, opt in ((straight, optimizer), (first, stopped)):
            set_gradients(params, step)
            opt.step()
    for p, q in zip(straight, first, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p][EMA_KEY], stopped.state[q][EMA_KEY])


def test_average_keeps_the_parameters_type_and_shape():
    params = parameters(dtype=torch.float64)
    optimizer = AdamWWithEMA(params, ema_decay=0.9, **ARGUMENTS)
    for step in range(2):
        set_gradients(params, step)
        optimizer.step()
    assert [optimizer.state[p][EMA_KEY].dtype for p in params] == [torch.float64] * 2
    assert [optimizer.state[p][EMA_KEY].shape for p in params] == [p.shape for p in params]


def test_weight_decay_leaves_norms_biases_modulation_gates_and_embeddings():
    """Rows of the embedding that no prompt uses get no gradient: decay alone would shrink them to nothing."""
    model = make_model(make_vlm(), variant="blend")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    parameters = {name: p for name, p in model.named_parameters() if not name.startswith("vlm.model.visual.")}
    trained = set(parameters)
    decayed = {name for name, p in parameters.items() if not torch.equal(p, torch.ones_like(p))}
    without = ("norm", "bias", "modulation", "residual_gate", "embed_tokens")
    assert {name for name in trained if any(word in name for word in without)} == trained - decayed
    assert {"vlm.model.language_model.embed_tokens.weight", "layers.0.modulation.weight"} <= trained - decayed
    assert {"image_io.0.patch_embed.weight", "vlm.model.language_model.layers.0.mlp.up_proj.weight"} <= decayed
