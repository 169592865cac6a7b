"""In: a model and calibration windows. Out: each weight's gradients or inputs, shown once and dropped.

A forward pass shows inputs (`products.py`), a forward and backward pass shows gradients (`gradients.py`). Read
`gradients.py` first: the steps of the pass are numbered there.
"""
