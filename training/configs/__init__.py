"""The fields of a run, parsing and saving them, DeepSpeed's JSON, and the presets."""
