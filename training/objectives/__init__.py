"""What a run trains on: each objective gives samples, batches and losses."""
