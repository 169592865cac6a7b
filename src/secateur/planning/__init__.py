"""Scores and a budget -> the plan: which units of each group stay."""
