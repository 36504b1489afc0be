"""Training objectives: each defines samples, batches and losses."""
