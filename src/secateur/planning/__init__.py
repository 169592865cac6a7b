"""A discovery, options and scores come in.

The Plan goes out: how many units each group keeps, and which.
Read `options.py` first, then `plan.py`; `sizes.py` meets the budget, `allocation.py` divides it among the groups.
"""
