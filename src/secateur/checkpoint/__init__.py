"""Pruned models on disk: a folder that others load, and the plan and the record that lie beside the weights."""

from __future__ import annotations

from secateur.checkpoint.folder import atomic_folder, check_vacant, check_writable, write_json
from secateur.checkpoint.record import PLAN_FILE, RECORD_FILE, Record, make_record, read_record
from secateur.checkpoint.stock import check_stock, save, save_again

__all__ = [
    "PLAN_FILE",
    "RECORD_FILE",
    "Record",
    "atomic_folder",
    "check_stock",
    "check_vacant",
    "check_writable",
    "make_record",
    "read_record",
    "save",
    "save_again",
    "write_json",
]
