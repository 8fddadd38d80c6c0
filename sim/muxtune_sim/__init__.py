"""The simulated executor: the same plans as on hardware, carried out on a SimPy clock."""

from muxtune_sim.executor import SimExecutor
from muxtune_sim.options import InstanceTotals, SimOptions
from muxtune_sim.simulate import SimReport, simulate

__all__ = [
    "InstanceTotals",
    "SimExecutor",
    "SimOptions",
    "SimReport",
    "simulate",
]
