"""A model and a Plan come in, and calibration windows for a repair.

The smaller model goes out; the dense one stays as it is.
Read `prune.py` first, then `repair.py` and `closed_form.py`.
"""
