"""Pruned models on disk: a folder that others load, and the plan and the record that lie beside the weights."""

from __future__ import annotations

from secateur.checkpoint.accounts import account
from secateur.checkpoint.folder import (
    atomic_file,
    atomic_folder,
    check_apart,
    check_file_vacant,
    check_vacant,
    check_writable,
    copy_in,
    write_json,
    write_manifest,
)
from secateur.checkpoint.record import PLAN_FILE, RECORD_FILE, Record, make_record, read_record, versions
from secateur.checkpoint.stock import check_stock, save, save_again
from secateur.checkpoint.verification import Verified, VerifiedFile, verify

__all__ = [
    "PLAN_FILE",
    "RECORD_FILE",
    "Record",
    "Verified",
    "VerifiedFile",
    "account",
    "atomic_file",
    "atomic_folder",
    "check_apart",
    "check_file_vacant",
    "check_stock",
    "check_vacant",
    "check_writable",
    "copy_in",
    "make_record",
    "read_record",
    "save",
    "save_again",
    "verify",
    "versions",
    "write_json",
    "write_manifest",
]
