"""A pruned folder and training data come in; the same model, trained, goes out as one ordinary folder.

`cut_and_train` cuts a dense model before. Read `recover` first.
"""
