"""What a fleet is made of besides instances: nodes, how they fail, and what tenants may use.

Plain data. The simulator draws failures from it (``muxtune_sim.hardware``), the engine keeps
tenants to their quotas (``muxtune.deciding``).
"""

from __future__ import annotations

from typing import NamedTuple


class NodeSpec(NamedTuple):
    """One machine. ``spot``: its owner may take it back."""

    node_id: str
    gpu_ids: tuple[str, ...]
    spot: bool = False


class FailureRules(NamedTuple):
    """Times in seconds; a mean of 0: it never happens. Up-times are drawn from exponential
    distributions, one random stream a GPU and a node, so that adding a node changes no other's
    fate. Repairs take as long as said.

    spot_lifetime_s: mean time for which a spot node is ours. spot_notice_s: from the notice to the
    loss. spot_absence_s: until such a node can be had again.
    """

    gpu_mtbf_s: float = 0.0
    gpu_repair_s: float = 0.0
    node_mtbf_s: float = 0.0
    node_repair_s: float = 0.0
    spot_lifetime_s: float = 0.0
    spot_notice_s: float = 0.0
    spot_absence_s: float = 0.0
    seed: int = 0


class TenantRules(NamedTuple):
    """What a tenant may use at a time. ``max_tasks``: tasks on instances; None: any number."""

    max_tasks: int | None = None


NO_FAILURES = FailureRules()
