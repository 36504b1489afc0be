"""Precomputed latents: the data set, its shards, and the writer."""
