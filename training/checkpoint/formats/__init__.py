"""Weights in files: every format that a checkpoint is exported to, read and written one tensor at a time.

source.py             what every reader offers, and export.json
recognise.py          path -> reader
matching.py           names in a file against names in a network
safetensors_files.py, torch_files.py, torch_dcp.py, universal.py      a format each: its reader and its writer
"""
