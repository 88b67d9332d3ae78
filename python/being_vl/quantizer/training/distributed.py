"""The few things that `being-vl quantizer train` shares between the processes of torchrun."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist

from being_vl.devices import find_device


@contextmanager
def process_group(device: str) -> Iterator[tuple[int, int, str]]:
    """Join the processes of torchrun, if there are several: yields rank, number of ranks, and this rank's device.

    Args:
        device: As `find_device` takes it.
    """
    ranks, device = int(os.environ.get("WORLD_SIZE", 1)), find_device(device)
    if ranks == 1:
        yield 0, 1, device
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.get_rank(), ranks, device
    finally:
        dist.destroy_process_group()


def wait_for_all_ranks() -> None:
    """Return when all ranks have come here."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all ranks' tensors, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """The mean over all ranks' tensors."""
    return all_reduce_sum(tensor.clone()) / (dist.get_world_size() if dist.is_initialized() else 1)


def all_gather(tensor: Tensor) -> Tensor:
    """All ranks' tensors, one after the other; they may be of different lengths (their first dimension)."""
    if not dist.is_initialized():
        return tensor
    lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
    # Only tensors of one shape can be gathered, so all are padded to the max_length and cut again.
    max_length = max(int(length) for length in lengths)
    padded_tensor = torch.cat([tensor, tensor.new_zeros(max_length - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(padded_tensor) for _ in lengths]
    dist.all_gather(parts, padded_tensor)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their means over all ranks, in one message."""
    if dist.is_initialized():
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        message = (
            all_reduce_sum(torch.cat([gradient.flatten() for gradient in gradients])) / dist.get_world_size()
        )
        for gradient, part in zip(gradients, message.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def broadcast_from_rank_0(tensors: Iterable[Tensor]) -> None:
    """Replace all ranks' tensors by those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
