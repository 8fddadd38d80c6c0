"""LobRA (VLDB 2025, arXiv 2509.01193): replicas of different shapes, and dispatch by length.

``fit_layer_times`` -> ``ReplicaTimes`` -> ``plan_deployment`` once; then for every step
``least_padding`` and ``fill_buckets`` -> ``dispatch_balanced`` -> ``fill``.
"""

from muxtune.planning.lobra.buckets import Buckets, fill_buckets, least_padding
from muxtune.planning.lobra.deployment import (
    Deployment,
    DeploymentOptions,
    homogeneous,
    plan_deployment,
)
from muxtune.planning.lobra.dispatch import (
    Dispatch,
    ReplicaGroup,
    ReplicaLoad,
    SolverOptions,
    dispatch_balanced,
    dispatch_by_length,
    dispatch_step,
    fill,
    slowest_s,
)
from muxtune.planning.lobra.layer_times import (
    LayerFit,
    LayerSample,
    LayerTimes,
    fit_layer_times,
    layer_fits,
)
from muxtune.planning.lobra.replica_times import (
    Communication,
    Configuration,
    ReplicaTimes,
    SequenceBatch,
)
from muxtune.planning.lobra.step_times import (
    PARAMETERS,
    HomogeneousStep,
    fit_communication,
    predicted_step_s,
)

__all__ = [
    "PARAMETERS",
    "Buckets",
    "Communication",
    "Configuration",
    "Deployment",
    "DeploymentOptions",
    "Dispatch",
    "HomogeneousStep",
    "LayerFit",
    "LayerSample",
    "LayerTimes",
    "ReplicaGroup",
    "ReplicaLoad",
    "ReplicaTimes",
    "SequenceBatch",
    "SolverOptions",
    "dispatch_balanced",
    "dispatch_by_length",
    "dispatch_step",
    "fill",
    "fill_buckets",
    "fit_communication",
    "fit_layer_times",
    "homogeneous",
    "layer_fits",
    "least_padding",
    "plan_deployment",
    "predicted_step_s",
    "slowest_s",
]
