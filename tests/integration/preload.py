# ruff: noqa: F401
"""Imported once by the server that the integration tests fork their processes from (launching.py)."""

# What training imports only while it runs: DeepSpeed's check of the optimizer imports torch's compiler, 2 seconds a rank.
import deepspeed.runtime.zero.muon.muon_optimizer
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import latte_flow.tools.benchmark
import latte_flow.tools.convert_checkpoint
import latte_flow.tools.encode_latents
import latte_flow.tools.sample
import latte_flow.training.distributed.tensor_parallel
import latte_flow.training.main

get_checkpoint_conversion_mapping("qwen2_vl")  # compiles a thousand regular expressions, which transformers then keeps
