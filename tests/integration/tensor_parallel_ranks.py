"""What the tests of tensor parallelism run in processes of their own, one a rank, on networks whose every weight is random.

A new network's layers are the identity: most of their gradients are zero, and a wrong one would not show in a short run.
"""

import copy
import itertools
from datetime import timedelta

import torch
import torch.distributed as dist

from latte_flow.model.context import encode_context
from latte_flow.model.latte_flow import LatteFlowModel
from latte_flow.model.tensor_split import partition_dim, take_part
from latte_flow.training.distributed.ranks import Ranks, arrange_ranks
from latte_flow.training.objectives.base import freeze_unreached
from latte_flow.training.objectives.flow_matching import FlowMatching
from tests.tiny import make_model, make_vlm, noise, text_prompts

SIZE = 2
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "input_layernorm", "post_attention_layernorm", "mlp"]


def cases():
    """Yield the settings of networks: both variants and projections, with all else taking turns."""
    others = itertools.cycle(
        [
            {"group_io": "per_group", "modulation": "six"},
            {"attention_backend": "sdpa"},
            {"residual_source": "accumulated", "post_norm": False},
            {"residual_attention": False},
            {"residual_space": "probabilities", "group_io": "per_group"},
        ]
    )
    for projection in ("generation", "vlm"):
        yield {"variant": "couple", "context_projection": projection, **next(others)}
        for shared in (["q_proj", "k_proj", "v_proj", "o_proj"], EVERYTHING, []):
            yield {"variant": "blend", "context_projection": projection, "shared_modules": shared, **next(others)}


def run(rank: int, world_size: int, store: str, function: str) -> None:
    """Be one rank, and call a function of this module."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    globals()[function](arrange_ranks(SIZE, timedelta(minutes=2)))
    dist.destroy_process_group()


def forward(model: LatteFlowModel, vlm, projection: str) -> torch.Tensor:
    """Return the velocity of a batch of 8, two a group."""
    prompts = text_prompts()
    context = None
    if model.config.variant == "couple":
        context = encode_context(vlm, prompts, projection).to(dtype=model.dtype)
    timesteps = torch.tensor([990.0, 800.0, 740.0, 600.0, 480.0, 300.0, 200.0, 20.0])
    rows = torch.arange(8) % 3
    return model(noise(8).double(), timesteps, context=context, context_rows=rows, prompt_inputs=prompts)


def compare_with_the_whole(ranks: Ranks) -> None:
    """Forward and gradients of the split network are those of the whole one, in float64; what is not split has equal bits."""
    for family, case in itertools.product(("qwen2_vl", "qwen3_vl"), cases()):
        vlm = make_vlm(family=family).double()
        whole = make_model(vlm, num_groups=4, **case).double()
        split = copy.deepcopy(whole)
        ranks.split_model(split)
        assert list(split.state_dict()) == list(whole.state_dict())
        for model in (whole, split):
            freeze_unreached(model, [FlowMatching])
        expected = forward(whole, vlm, case["context_projection"])
        velocity = forward(split, ranks.split_frozen(vlm), case["context_projection"])
        torch.testing.assert_close(velocity, expected, rtol=1e-11, atol=1e-11)
        target = noise(8, seed=3).double()
        for prediction in (expected, velocity):
            (prediction - target).square().mean().backward()
        gradients = {name: p.grad for name, p in split.named_parameters() if p.requires_grad}
        trained = {name: p for name, p in whole.named_parameters() if p.requires_grad}
        assert gradients.keys() == trained.keys()
        unsplit = [name for name in trained if partition_dim(name) is None]
        assert 0 < len(unsplit) < len(trained)
        for name, parameter in trained.items():
            assert parameter.grad.abs().max() > 1e-12, (case, name)  # or nothing was compared
            part = take_part(name, parameter.grad, ranks.tensor_rank, SIZE)
            torch.testing.assert_close(gradients[name], part, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
            assert getattr(split.get_parameter(name), "tensor_model_parallel", False) == (name not in unsplit), name
        own = torch.cat([gradients[name].flatten() for name in unsplit] + [velocity.detach().flatten()])
        theirs = [torch.empty_like(own) for _ in range(SIZE)]
        dist.all_gather(theirs, own)
        assert torch.equal(*theirs), case
        gates = ranks.gather_heads(split.gate_values(torch.linspace(1000, 0, 5)))
        for layer, values in whole.gate_values(torch.linspace(1000, 0, 5)).items():
            torch.testing.assert_close(gates[layer], values)


def frozen_vlm_stays_whole(ranks: Ranks) -> None:
    """Its part is a model of its own that shares what is not split, and holds this rank's keys and values."""
    vlm = make_vlm()
    before = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    part = ranks.split_frozen(vlm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vlm.state_dict().items())
    shared = {id(p) for p in vlm.parameters()} & {id(p) for p in part.parameters()}
    names = [name for name, _ in vlm.named_parameters()]
    assert len(shared) == sum(partition_dim(name) is None for name in names) < len(names)
    whole, own = (encode_context(network, text_prompts(), "vlm") for network in (vlm, part))
    for layer, tensors in whole.states.items():
        for tensor, mine in zip(tensors, own.states[layer], strict=True):
            torch.testing.assert_close(mine, tensor.chunk(SIZE, dim=1)[ranks.tensor_rank], rtol=1e-4, atol=1e-4)
