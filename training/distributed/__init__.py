"""Ranks: their place, the batch layout, tensor parallelism, collectives, and what is read of DeepSpeed's ZeRO optimizers."""
