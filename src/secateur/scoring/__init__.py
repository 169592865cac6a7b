"""In: a model, its dependency groups and calibration windows. Out: one score per unit of each group.

`passes/` runs the model and shows gradients and inputs to collectors (`collect_*.py`), which add them up to
`Statistics`; `unit_scores.py` adds those up to units. Read `registry.py` first: each score with its formula and paper.
"""
