"""Tokenizer and text -> which tokens may go, in which order, at what price; and the tokenizer without them.

`pieces` says what a text is encoded into without a token, `ranking` in which order tokens go, by the use that
`calibrated` counts; `tokenizer` and `token_ids` rewrite what names them, `lost_scripts` says whose texts grow longer.
"""
