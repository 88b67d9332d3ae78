"""The codebook of a quantizer in training: where its codes start, how they move, and which are placed again."""

import torch
from torch import Tensor

from being_vl.quantizer.models.tiled import squared_distances
from being_vl.quantizer.training.distributed import all_gather, all_reduce_sum

LATENTS_AT_A_TIME = 4096
"""Latents whose distances to all codes are in memory."""


class Codebook:
    """Codes, moving averages of their latents, and how often they are used.

    Args:
        weight: The codes (K, D), changed in place.
        ema_decay: Decay of the moving averages.
        dead_threshold: A code that is used less than this often per batch, on average, is placed again.
        is_moving: Whether the codes are the moving averages; else something else moves them, as an optimizer.
    """

    def __init__(
        self, weight: Tensor, ema_decay: float, dead_threshold: float, is_moving: bool = True
    ) -> None:
        self.weight, self.is_moving = weight, is_moving
        self.ema_decay, self.dead_threshold = ema_decay, dead_threshold
        self.counts = torch.ones(len(weight), device=weight.device)
        self.sums = weight.clone()

    def find_nearest_codes(self, latents: Tensor) -> Tensor:
        """Ids (N,) of latents (N, D)."""
        return find_nearest(latents, self.weight)

    @torch.no_grad()
    def place(self, folders: list[Tensor], num_reserved: int, rng: torch.Generator) -> None:
        """Place all codes by k-means on the latents (N, D) of each folder, started as k-means++ does.

        The first `num_reserved` codes are placed on those of the first folder alone. Other codes then keep away from
        them: one that is nearer to any of that folder's latents than its reserved code is moved to a latent that is
        not.
        """
        # The reserved codes on the first folder, the others on the rest.
        first_folder, latents = folders[0], torch.cat(folders[1:] if num_reserved else folders)
        reserved_codes = _k_means(first_folder, num_reserved, self.weight[:0], rng)
        codes = _k_means(latents, len(self.weight), reserved_codes, rng)
        # Codes that would take latents of the first folder from a reserved one go elsewhere.
        if num_reserved:
            distances = _errors(first_folder, reserved_codes)
            distant_latents = latents[~_is_nearer(latents, first_folder, distances)]
            is_too_near = _is_nearer(codes, first_folder, distances)
            is_too_near[:num_reserved] = False
            if len(distant_latents):
                order = _draw(_errors(distant_latents, codes), int(is_too_near.sum()), rng)
                codes[is_too_near] = distant_latents[order]
        # The averages start as if batches of 2048 latents had been seen.
        counts = _sum_by_id(latents, find_nearest(latents, codes), len(codes))[0]
        self.counts.copy_(counts / len(latents) * 2048).clamp_(min=self.dead_threshold)
        self.weight.copy_(codes)
        self.sums.copy_(codes * self.counts[:, None])

    @torch.no_grad()
    def update(self, latents: Tensor, ids: Tensor, chances: Tensor) -> None:
        """Follow the latents (N, D) that got `ids` (N,), and place unused codes where the error is large.

        Under torchrun the latents of all ranks count, and the codes stay the same in all of them.

        Args:
            latents: This rank's.
            ids: Of their codes.
            chances: A random number of 0 to 1 for each, which decides where unused codes go.
        """
        # The moving averages, and the codes that follow them.
        counts, sums = _sum_by_id(latents, ids, len(self.weight))
        counts, sums = all_reduce_sum(counts), all_reduce_sum(sums)
        self.counts.lerp_(counts, 1 - self.ema_decay)
        self.sums.lerp_(sums, 1 - self.ema_decay)
        if self.is_moving:
            self.weight.copy_(self.sums / self.counts.clamp(min=1e-6)[:, None])
        # Dead codes, at most one for every 16 latents at a time.
        dead_ids = (self.counts < self.dead_threshold).nonzero().squeeze(1)[: max(1, int(counts.sum()) // 16)]
        if len(dead_ids) == 0:
            return
        # A draw without replacement, weighted by the errors: the largest of log(chance) / error (Efraimidis, 2006).
        errors = (latents - self.weight[ids]).square().sum(1).clamp(min=1e-12)
        keys = chances.to(latents).clamp(min=1e-12).log() / errors
        keys, order = keys.topk(min(len(dead_ids), len(keys)))
        keys, candidates = all_gather(keys), all_gather(latents[order])
        new_codes = candidates[keys.topk(min(len(dead_ids), len(keys))).indices]
        # They take the place of dead ones, and have a while to prove themselves.
        dead_ids = dead_ids[: len(new_codes)]
        self.weight[dead_ids] = new_codes
        self.counts[dead_ids] = 2 * self.dead_threshold
        self.sums[dead_ids] = new_codes * self.counts[dead_ids, None]


def find_nearest(latents: Tensor, codes: Tensor) -> Tensor:
    """The nearest of codes (K, D) to each of latents (N, D): (N,)."""
    parts = latents.split(LATENTS_AT_A_TIME)
    return torch.cat([squared_distances(part, codes).argmin(1) for part in parts])


def _errors(latents: Tensor, codes: Tensor) -> Tensor:
    """Squared distances of latents to their nearest codes: (N,)."""
    parts = [squared_distances(part, codes).amin(1) for part in latents.split(LATENTS_AT_A_TIME)]
    return torch.cat(parts).clamp(min=1e-12)


def _is_nearer(candidates: Tensor, latents: Tensor, distances: Tensor) -> Tensor:
    """Whether candidates (M, D) are nearer to any of latents (N, D) than at its squared distance (N,): (M,)."""
    parts = candidates.split(LATENTS_AT_A_TIME)
    return torch.cat([(squared_distances(part, latents) < distances).any(1) for part in parts])


def _k_means(latents: Tensor, size: int, fixed_codes: Tensor, rng: torch.Generator) -> Tensor:
    """`size` codes (size, D), of which the first are `fixed_codes` and stay."""
    if size == len(fixed_codes):
        return fixed_codes
    # The start: latents drawn by their distance to the codes so far, a sixteenth at a time (k-means||).
    codes = torch.cat([fixed_codes, latents[_draw(torch.ones(len(latents)), 1, rng).to(latents.device)]])
    errors = _errors(latents, codes)
    while len(codes) < size:
        new_codes = latents[_draw(errors, min(max(1, size // 16), size - len(codes)), rng)]
        errors = torch.minimum(errors, _errors(latents, new_codes))
        codes = torch.cat([codes, new_codes])
    # Ten rounds of Lloyd's algorithm: each code moves to the mean of the latents that are nearest to it.
    for _ in range(10):
        counts, sums = _sum_by_id(latents, find_nearest(latents, codes), size)
        is_movable = counts > 0
        is_movable[: len(fixed_codes)] = False
        codes[is_movable] = sums[is_movable] / counts[is_movable, None]
    return codes


def _sum_by_id(latents: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How many latents (N, D) have each id, and their sums: (size,), (size, D)."""
    counts = torch.bincount(ids, minlength=size).to(latents.dtype)
    return counts, torch.zeros(size, latents.shape[1], device=latents.device).index_add_(0, ids, latents)


def _draw(weights: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """`count` indices, drawn with replacement by `weights`."""
    return torch.multinomial(weights.cpu().double(), count, True, generator=rng).to(weights.device)
