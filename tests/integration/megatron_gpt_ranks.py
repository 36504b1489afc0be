"""What --to megatron-gpt writes, in megatron-core's GPTModel: processes of their own, one a tensor-parallel rank."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from tests.integration.launching import SERVER, TIMEOUT


def logits(folder: Path, ids: Tensor, tmp_path: Path, *, ranks: int) -> Tensor:
    """Return the logits [B, S, vocabulary filled up] of token ids [B, S], from ranks that load the folder."""
    torch.save(ids, tmp_path / "ids.pt")
    processes = [SERVER.Process(target=run, args=(rank, ranks, str(folder), str(tmp_path))) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    assert [process.exitcode for process in processes] == [0] * ranks
    parts = [torch.load(tmp_path / f"logits_{rank}.pt") for rank in range(ranks)]
    assert all(torch.equal(part, parts[0]) for part in parts)
    return parts[0]


def run(rank: int, ranks: int, folder: str, work: str) -> None:
    """Be one rank: build the model from the folder, load this rank's file, answer."""
    # Here, because the ranks' server has imported megatron already, and pytest's own process does not need it.
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer import TransformerConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{work}/store_{ranks}", ranks), rank=rank, world_size=ranks)
    # Megatron asks CUDA where to put things, and keeps CUDA's random state for dropout unless it is for inference.
    torch.cuda.current_device = lambda: "cpu"
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    parallel_state.initialize_model_parallel(ranks)
    arguments = json.loads((Path(folder) / "gpt_model.json").read_text())
    fields = arguments["transformer_config"]
    fields["activation_func"] = getattr(torch.nn.functional, fields["activation_func"])
    model = GPTModel(
        config=TransformerConfig(**fields, use_cpu_initialization=True),
        transformer_layer_spec=get_gpt_layer_local_spec(
            normalization=fields["normalization"], qk_layernorm=fields["qk_layernorm"]
        ),
        parallel_output=False,
        **arguments["gpt_model"],
    ).eval()
    iteration = int((Path(folder) / "latest_checkpointed_iteration.txt").read_text())
    file = Path(folder) / f"iter_{iteration:07d}" / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
    model.load_state_dict(torch.load(file, weights_only=True)["model"], strict=True)
    ids = torch.load(f"{work}/ids.pt")
    length = ids.shape[1]
    hidden = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        torch.save(model(ids, torch.arange(length).expand_as(ids), hidden), f"{work}/logits_{rank}.pt")
    dist.destroy_process_group()


def assert_logits_agree(theirs: Tensor, vlm: PreTrainedModel, ids: Tensor) -> None:
    """Check Megatron's logits against transformers' [B, S, vocabulary]; the rows that fill the vocabulary up give zero."""
    with torch.no_grad():
        expected = vlm(input_ids=ids).logits
    size = expected.shape[-1]
    torch.testing.assert_close(theirs[..., :size], expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1  # far above what is tolerated
    assert not theirs[..., size:].any()
