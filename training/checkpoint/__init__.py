"""Checkpoints: the commit protocol, the layout on disk, elastic loading, and the formats."""
