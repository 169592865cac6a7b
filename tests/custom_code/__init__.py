"""A model that transformers does not know, as a folder on the hub brings one: config, model and tokenizer as code.

A bilingual GLM in small: tokens looked for in every row, functions compiled by TorchScript, tokens before the batch,
fused projections interleaved by head, two-dimensional rotary embeddings, attention scores scaled by layer, and
residuals that carry the normed input times a constant.
"""
