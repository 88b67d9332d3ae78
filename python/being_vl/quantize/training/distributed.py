"""The few things that `being-vl quantizer train` shares between the processes of torchrun."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist


@contextmanager
def processes(device: str) -> Iterator[tuple[int, int, str]]:
    """This process's rank, the number of them, and its device; one process, unless torchrun says otherwise."""
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks == 1:
        yield 0, 1, device
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield dist.get_rank(), ranks, device
    finally:
        dist.destroy_process_group()


def all_summed(tensor: Tensor) -> Tensor:
    """The sum of all processes' tensors, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_gathered(tensor: Tensor) -> Tensor:
    """All processes' tensors, one after the other; they may be of different lengths (their first dimension)."""
    if not dist.is_initialized():
        return tensor
    lengths = [torch.zeros(1, dtype=torch.int64, device=tensor.device) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
    longest = max(int(length) for length in lengths)
    padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their means over all processes, in one message."""
    if dist.is_initialized():
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = all_summed(torch.cat([gradient.flatten() for gradient in gradients])) / dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def averaged(tensor: Tensor) -> Tensor:
    """The mean over all processes."""
    return all_summed(tensor.clone()) / (dist.get_world_size() if dist.is_initialized() else 1)


def same_everywhere(tensors: Iterable[Tensor]) -> None:
    """Replace tensors by those of the first process."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)
