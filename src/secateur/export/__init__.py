"""Pruned models for other programs than transformers."""

from __future__ import annotations

from secateur.export.check import Checked
from secateur.export.gguf_file import DEFAULT_TYPE, SUFFIX, TYPES, Exported, check_gguf, export_gguf

__all__ = ["DEFAULT_TYPE", "SUFFIX", "TYPES", "Checked", "Exported", "check_gguf", "export_gguf"]
