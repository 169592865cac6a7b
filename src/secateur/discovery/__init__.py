"""A model on `meta` -> the groups of weight dimensions that shrink together."""
