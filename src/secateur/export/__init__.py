"""Model -> a GGUF file for llama.cpp, a quantized folder for vLLM or transformers, a merged adapter, or the hub.

In: a model, dense or pruned, in memory or as a MODEL argument. Out: files that other programs load, checked against the
model before they get their name. Read `formats` first: it has the entry function of each format.
"""
