"""A pruned model, its Plan and the record of how it was made come in.

A folder that the ordinary loader reads goes out, written whole or not at all.
Read `save.py` first, then `formats.py`.
"""
