"""Several processes, started by torchrun: each holds the whole model and reads its own rows of every batch.

Losses, gradients and the metric are averaged over the processes, so all of them choose alike. Alone, a process is
rank 0 of 1 and nothing here does anything.
"""
import os

import torch
import torch.distributed as dist


def join(device_type):
    """Join the processes that torchrun started, if it did: by NCCL on CUDA devices, else by gloo."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo")


def leave():
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average(tensors):
    """Replace each tensor, in place, by its mean over the processes."""
    if world() > 1:
        for tensor in tensors:
            total = tensor.cuda() if dist.get_backend() == "nccl" else tensor         # NCCL sums on CUDA devices only
            dist.all_reduce(total)
            tensor.copy_(total / world())


def shared_out(work, items):
    """work(item), a tuple of tensors, for each item in turn; every process does its share of the items and gets all."""
    for first in range(0, len(items), world()):
        done = [work(item) for item in items[first:first + world()][rank():rank() + 1]]
        if world() > 1:
            parts = [None] * world()
            dist.all_gather_object(parts, [[tensor.cpu() for tensor in result] for result in done])
            done = [result for part in parts for result in part]
        yield from done
