"""A node of the graph -> the dimensions of its outputs: one rule per ATen operator, in one file per operator family.

A rule unifies what its operator forces to agree and notes what the operator does along a dimension. Read `registry`
first: it has the interface and shows how to add a rule.
"""
