"""Readers of weights in files, one tensor at a time; the writers are in tools/conversion/writers.py.

source.py             the interface of all readers, and export.json
recognise.py          path -> reader
matching.py           matches names in a file to names in a network
zero_source.py (over zero_shards.py), universal.py, safetensors_files.py, torch_files.py, torch_dcp.py      one format each
"""
