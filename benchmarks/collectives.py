# SPDX-License-Identifier: Apache-2.0
"""What is the fastest reduce-scatter and all-gather of one bucket on Gloo?

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/collectives.py [--bucket-mb 1 16 32 64] [--rounds 12]

Compares torch's own with the same made of an all-to-all, of two that leave out a rank's own slice, and of
point-to-point exchange, each followed by a sum in rank order. All forms take turns within one run; the table gives
medians in milliseconds, fp32, buffers allocated before.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def forms_of(bucket: Tensor, receive: Tensor, shard: Tensor) -> dict[str, Callable[[], object]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine, theirs = bucket.chunk(world_size), receive.chunk(world_size)
    peers = [peer for peer in range(world_size) if peer != rank]

    def exchange(send: Callable[[int], Tensor], into: Callable[[int], Tensor]) -> None:
        sends = [dist.P2POp(dist.isend, send(peer), peer) for peer in peers]
        receives = [dist.P2POp(dist.irecv, into(peer), peer) for peer in peers]
        for work in dist.batch_isend_irecv([*sends, *receives]):
            work.wait()

    def add_up(sources: list[Tensor]) -> None:
        torch.add(sources[0], sources[1], out=shard)
        for source in sources[2:]:
            shard.add_(source)

    def all_to_all_and_add() -> None:
        dist.all_to_all_single(receive, bucket)
        add_up(list(theirs))

    def two_all_to_alls_and_add() -> None:
        start, stop = rank * len(shard), (rank + 1) * len(shard)
        before = [len(shard) if peer < rank else 0 for peer in range(world_size)]
        after = [len(shard) if peer > rank else 0 for peer in range(world_size)]
        arrived = receive[: len(bucket) - len(shard)]
        works = [
            dist.all_to_all_single(arrived[start:], bucket[:start], after, before, async_op=True),
            dist.all_to_all_single(arrived[:start], bucket[stop:], before, after, async_op=True),
        ]
        for work in works:
            work.wait()
        parts = arrived.split(len(shard))
        add_up([*parts[:rank], mine[rank], *parts[rank:]])

    def point_to_point_and_add() -> None:
        exchange(lambda peer: mine[peer], lambda peer: theirs[peer])
        add_up([mine[rank] if peer == rank else theirs[peer] for peer in range(world_size)])

    return {
        "reduce_scatter": lambda: _reduce_scatter(shard, bucket),
        "all_to_all + add": all_to_all_and_add,
        "two all_to_alls + add": two_all_to_alls_and_add,
        "isend/irecv + add": point_to_point_and_add,
        "all_gather": lambda: _all_gather(bucket, mine[rank]),
        "all_gather by isend/irecv": lambda: exchange(lambda peer: mine[rank], lambda peer: mine[peer]),
        "all_reduce": lambda: dist.all_reduce(bucket),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket-mb", type=float, nargs="+", default=[1, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        print(
            f"torch {torch.__version__}, Python {platform.python_version()}, {world_size} ranks, {platform.machine()}"
        )
    for bucket_mb in arguments.bucket_mb:
        shard_numel = int(bucket_mb * 2**20 / 4 / world_size)
        bucket, receive = torch.ones(shard_numel * world_size), torch.ones(shard_numel * world_size)
        forms = forms_of(bucket, receive, torch.empty(shard_numel))
        times: dict[str, list[float]] = {name: [] for name in forms}
        for _ in range(arguments.rounds):
            for name, run in forms.items():
                dist.barrier()
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
                bucket.fill_(1.0)
        if rank == 0:
            print(f"{bucket_mb:g} MB")
            for name, values in times.items():
                low, middle, high = min(values), statistics.median(values), max(values)
                print(f"  {name:27} {middle:8.2f}  ({low:.2f} to {high:.2f})")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
