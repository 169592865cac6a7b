"""A model on `meta` -> the groups of weight dimensions that shrink together, with no weights read and no family named.

`tracing` records the operators of a forward pass, `inference` gives every tensor its dimensions by one rule per
operator (`rules`), and `joining` makes groups of the dimensions that weights share. Read `discover` first, then
`algebra` and `rules/registry`, which shows how to add an operator.
"""
