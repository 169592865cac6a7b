"""A MODEL argument comes in: a hub name, a folder, a GGUF file, a config file or `demo`.

Its config, its tokenizer and the model itself go out, on `meta` (`skeleton`), on a CPU or on GPUs (`load`).
Read `sources.py` first, then `config.py` and `loading.py`.
"""
