"""The fields of a run, how they are parsed and saved, DeepSpeed's JSON, and the presets."""
