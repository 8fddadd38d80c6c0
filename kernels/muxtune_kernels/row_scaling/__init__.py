"""Rows of some slots times a vector of their slot, in place, and the vectors' gradients."""

from .op import SlotVectors, scale_slot_rows_, scale_slot_rows_backward_

__all__ = ["SlotVectors", "scale_slot_rows_", "scale_slot_rows_backward_"]
