"""Predictions beside measurements, on cases that a profile cannot have known."""
