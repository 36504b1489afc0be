"""Latents that were encoded ahead: the data set, one shard of it, and the writer."""
