"""Ranks, the batch layout, tensor parallelism, collectives, and access to the state of DeepSpeed's ZeRO optimizers."""
