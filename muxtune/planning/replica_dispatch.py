"""Which replica of an instance computes which sequences of a micro-batch.

Replicas of one instance may have different shapes (LobRA, arXiv 2509.01193). Every replica takes
part in every micro-batch, so that all of them close a task's step together, if need be with no row
of their own. What is dealt out are packs: the chunks that one sequence or more share. The largest
comes first, to the replica that would be through with it first when speed goes with its GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence

from muxtune.types import Chunk, MicroBatch, PackRule, ReplicaShape


def deal(micro_batch: MicroBatch, replicas: Sequence[ReplicaShape]) -> list[MicroBatch]:
    """One micro-batch a replica: chunks in their order, in a shape just as large as they need."""
    loads = [0.0] * len(replicas)
    owner: dict[int, int] = {}
    packs = _packs(micro_batch)
    for index in sorted(range(len(packs)), key=lambda i: -_tokens(packs[i])):
        tokens = _tokens(packs[index])
        ends = [(load + tokens / shape.num_gpus, at)
                for at, (load, shape) in enumerate(zip(loads, replicas, strict=True))]  # fmt: skip
        end, chosen = min(ends)
        loads[chosen], owner[index] = end, chosen
    return [
        _part(micro_batch, replica, [p for i, p in enumerate(packs) if owner[i] == replica])
        for replica in range(len(replicas))
    ]


def _packs(micro_batch: MicroBatch) -> list[list[Chunk]]:
    """Neighbouring chunks that a sequence ties together; a padded row stands by itself."""
    packs: list[list[Chunk]] = []
    for chunk in micro_batch.chunks:
        if not chunk.pieces:
            continue
        goes_on = chunk.pieces[0].start > 0 and micro_batch.packing is PackRule.CHUNK
        if goes_on:
            packs[-1].append(chunk)
        else:
            packs.append([chunk])
    return packs


def _tokens(pack: Sequence[Chunk]) -> int:
    return sum(piece.stop - piece.start for chunk in pack for piece in chunk.pieces)


def _part(micro_batch: MicroBatch, replica: int, packs: Sequence[list[Chunk]]) -> MicroBatch:
    chunks = tuple(chunk for pack in packs for chunk in pack)
    shape = micro_batch.shape._replace(num_chunks=len(chunks))
    return micro_batch._replace(replica=replica, chunks=chunks, shape=shape)
