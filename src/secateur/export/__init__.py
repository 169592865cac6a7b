"""Model -> a GGUF file for llama.cpp, a folder with int8 weights, or a folder with a merged LoRA adapter.

In: a model, dense or pruned, in memory or as a MODEL argument. Out: files that other programs load, checked against the
model before they get their name. Read `formats` first: it has the entry function of each format.
"""
