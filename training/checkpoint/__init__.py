"""Checkpoints: the commit protocol, what a checkpoint is on disk, elastic loading, and the formats."""
