"""Tokenizer and text -> which tokens may go, in which order, at what price; and the tokenizer without them.

Modules: `pieces` (what a text is encoded into without a token), `ranking`, `tokenizer`, `token_ids`, `losses`.
"""
