"""Measuring a machine's operations for the profiled cost model."""

from muxtune.profiling.measure import (
    device_description,
    profile_machine,
    profile_warnings_here,
    software_description,
    write_profile,
)

__all__ = [
    "device_description",
    "profile_machine",
    "profile_warnings_here",
    "software_description",
    "write_profile",
]
