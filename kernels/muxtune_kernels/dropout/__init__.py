"""Seeded dropout whose mask depends on the task's own data alone, never on the packing."""

from .reference import RowDropout, dropout_keep_mask, row_keys

__all__ = ["RowDropout", "dropout_keep_mask", "row_keys"]
