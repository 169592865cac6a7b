"""A pruned folder and training data come in; the same model, trained, goes out as one ordinary folder.

`rounds` cuts and trains a dense model several times. Read `recover` first.
"""
