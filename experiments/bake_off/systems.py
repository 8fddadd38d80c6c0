"""What is compared: each system as settings of `muxtune simulate`.

``published`` systems execute as their own programs do (who launches kernels, whose adapter kernels
are grouped); ``same kernels`` gives every policy the captured passes and grouped kernels of
muxtune, so that only scheduling differs. Both are properties of the costs (``cost.style``,
``cost.adapters``); no policy holds a speed.
"""

from __future__ import annotations

from typing import NamedTuple

PUBLISHED, SAME_KERNELS = "published", "same kernels"
BOTH = (PUBLISHED, SAME_KERNELS)
LOADS = (0.5, 0.75, 1.0, 1.25, 1.5)
# Beyond the loads that the experiment is about: where do the faster systems bend?
FAST_LOADS = (3.0, 8.0)


class System(NamedTuple):
    """``panels``: where it is drawn; ``loads``: at which it is run; ``replicas``: GPUs that are
    joined to one instance, each holding a replica."""

    name: str
    label: str
    words: tuple[str, ...]
    panels: tuple[str, ...]
    loads: tuple[float, ...]
    replicas: int = 1


_EAGER = LOADS
_FAST = (*LOADS, *FAST_LOADS)
_VARIANT = (LOADS[2], *FAST_LOADS)  # at low loads they run one task a GPU, as the others do
# Large padded batches may recompute activations, as mLoRA's measured 30 GB show that it does.
_RECOMPUTE = "+planner.recompute=true"
_CAPTURED = ("cost.style=graph", "cost.adapters=grouped")

SYSTEMS: tuple[System, ...] = (
    System("hf_peft", "HF PEFT, exclusive", ("planner=exclusive",), BOTH, _EAGER),
    System(
        "colocated",
        "HF PEFT, colocated",
        ("planner=exclusive", "cluster_policy=fifo_colocated", "cluster.instances_per_gpu=auto"),
        (PUBLISHED,),
        _EAGER,
    ),
    System(
        "sl_peft",
        "SL-PEFT, batched",
        ("planner=batched", "cost.style=eager", "cost.adapters=grouped", _RECOMPUTE),
        (PUBLISHED,),
        _EAGER,
    ),
    System("mlora", "mLoRA", ("planner=mlora", _RECOMPUTE), (PUBLISHED,), _EAGER),
    System("lorafusion", "LoRAFusion", ("planner=lorafusion",), (PUBLISHED,), _EAGER),
    System("tlora", "tLoRA", ("planner=tlora",), (PUBLISHED,), _EAGER),
    System("exclusive_fast", "NeMo-like, exclusive", ("planner=exclusive_fast",), BOTH, _FAST),
    System(
        "batched_fast",
        "batched (SL-PEFT, mLoRA)",
        ("planner=batched", _RECOMPUTE, *_CAPTURED),
        (SAME_KERNELS,),
        _VARIANT,
    ),
    System(
        "lorafusion_fast",
        "LoRAFusion",
        (
            "planner=lorafusion",
            "+planner.tile_tokens=16",
            *_CAPTURED,
        ),  # muxtune's kernels' row tile
        (SAME_KERNELS,),
        _VARIANT,
    ),
    System("tlora_fast", "tLoRA", ("planner=tlora", *_CAPTURED), (SAME_KERNELS,), _VARIANT),
    System("lobra", "LobRA, 2 replicas", ("planner=lobra", *_CAPTURED), BOTH, LOADS, replicas=2),
    System("muxtune", "MuxTune", ("planner=muxtune", "+planner.hysteresis=false"), BOTH, _FAST),
    # What `planner=muxtune` is by default: hysteresis came after the runs of the others.
    System(
        "muxtune_default", "MuxTune, hysteresis", ("planner=muxtune",), (SAME_KERNELS,), _VARIANT
    ),
)


def system(name: str) -> System:
    return next(each for each in SYSTEMS if each.name == name)
