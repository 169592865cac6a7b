"""Pruned models on disk: a folder that others load, and the plan and the record that lie beside the weights."""

from __future__ import annotations

from secateur.checkpoint.folder import (
    atomic_file,
    atomic_folder,
    check_file_vacant,
    check_vacant,
    check_writable,
    write_json,
)
from secateur.checkpoint.record import PLAN_FILE, RECORD_FILE, Record, make_record, read_record
from secateur.checkpoint.stock import check_stock, save

__all__ = [
    "PLAN_FILE",
    "RECORD_FILE",
    "Record",
    "atomic_file",
    "atomic_folder",
    "check_file_vacant",
    "check_stock",
    "check_vacant",
    "check_writable",
    "make_record",
    "read_record",
    "save",
    "write_json",
]
