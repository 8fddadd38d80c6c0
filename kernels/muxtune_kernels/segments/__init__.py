"""Sums over each slot's rows: gradients of what all rows of a slot share."""

from .op import segment_sum, segment_sum_reference

__all__ = ["segment_sum", "segment_sum_reference"]
