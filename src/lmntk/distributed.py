"""What several processes share: who is first, and sums over all of them."""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Answer = TypeVar("Answer")


def world_size() -> int:
    """The number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; the first, 0, writes files and shows progress."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process writes files and shows progress."""
    return rank() == 0


def sum_over_processes(tensor: Tensor, device: torch.device) -> Tensor:
    """Add a tensor up over all processes: shares that are zero where others are not stay the same to the bit.

    Args:
        tensor: This process's share, on the CPU.
        device: Where the processes can meet: their GPU under NCCL.
    """
    if world_size() == 1:
        return tensor
    shared = tensor.to(device)
    dist.all_reduce(shared)
    return shared.cpu()


def first_decides(answer: Answer) -> Answer:
    """Return the first process's answer on all of them: what each sees of disks and memory may differ."""
    if world_size() == 1:
        return answer
    answers = [answer]
    dist.broadcast_object_list(answers)
    return answers[0]
