"""Operators in a tiny model each, and the axes that their rules should find: one file per family, as the rules."""
