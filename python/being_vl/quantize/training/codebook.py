"""The codebook of a quantizer in training: where its codes start, how they move, and which are placed anew."""

import torch
from torch import Tensor

from being_vl.quantize.models.tiled import squared_distances
from being_vl.quantize.training.distributed import all_gathered, all_summed

AT_A_TIME = 4096  # latents whose distances to all codes are in memory


class Codebook:
    """Codes, moving averages of their latents, and how often they are used.

    Args:
        weight: The codes (K, D), changed in place.
        decay: Of the moving averages.
        dead: A code that is used less than this often per batch, on average, is placed anew.
        moving: Whether the codes are the moving averages; else something else moves them, as an optimiser.
    """

    def __init__(self, weight: Tensor, decay: float, dead: float, moving: bool = True) -> None:
        self.weight, self.decay, self.dead, self.moving = weight, decay, dead, moving
        self.counts = torch.ones(len(weight), device=weight.device)
        self.sums = weight.clone()

    def nearest(self, latents: Tensor) -> Tensor:
        """Ids (N,) of latents (N, D)."""
        return nearest(latents, self.weight)

    @torch.no_grad()
    def place(self, folders: list[Tensor], reserved: int, rng: torch.Generator) -> None:
        """Place all codes by k-means on the latents (N, D) of each folder, started as k-means++ does.

        The first `reserved` codes are placed on those of the first folder alone. Other codes then keep away from
        them: one that is nearer to any of that folder's latents than its own is moved to a latent that is not.
        """
        first, latents = folders[0], torch.cat(folders[1:] if reserved else folders)
        own = _k_means(first, reserved, self.weight[:0], rng)
        codes = _k_means(latents, len(self.weight), own, rng)
        if reserved:
            distances = _errors(first, own)
            away = latents[~_is_nearer(latents, first, distances)]
            moved = _is_nearer(codes, first, distances)
            moved[:reserved] = False
            if len(away):
                codes[moved] = away[_draw(_errors(away, codes), int(moved.sum()), rng)]
        counts = _gather(latents, nearest(latents, codes), len(codes))[0]
        self.counts.copy_(counts / len(latents) * 2048).clamp_(min=self.dead)
        self.weight.copy_(codes)
        self.sums.copy_(codes * self.counts[:, None])

    @torch.no_grad()
    def update(self, latents: Tensor, ids: Tensor, chances: Tensor) -> None:
        """Follow the latents (N, D) that got `ids` (N,), and place unused codes where the error is large.

        Under torchrun the latents of all processes count, and the codes stay the same in all of them.

        Args:
            latents: This process's.
            ids: Of their codes.
            chances: A random number of 0 to 1 for each, which decides where unused codes go.
        """
        counts, sums = _gather(latents, ids, len(self.weight))
        counts, sums = all_summed(counts), all_summed(sums)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        if self.moving:
            self.weight.copy_(self.sums / self.counts.clamp(min=1e-6)[:, None])
        unused = (self.counts < self.dead).nonzero().squeeze(1)[: max(1, int(counts.sum()) // 16)]
        if len(unused) == 0:
            return
        # A draw without replacement, weighted by the errors: the largest of log(chance) / error (Efraimidis, 2006).
        errors = (latents - self.weight[ids]).square().sum(1).clamp(min=1e-12)
        keys = chances.to(latents).clamp(min=1e-12).log() / errors
        keys, order = keys.topk(min(len(unused), len(keys)))
        keys, candidates = all_gathered(keys), all_gathered(latents[order])
        drawn = candidates[keys.topk(min(len(unused), len(keys))).indices]
        unused = unused[: len(drawn)]
        self.weight[unused] = drawn
        self.counts[unused] = 2 * self.dead  # a while to prove itself
        self.sums[unused] = drawn * self.counts[unused, None]


def nearest(latents: Tensor, codes: Tensor) -> Tensor:
    """The nearest of codes (K, D) to each of latents (N, D): (N,)."""
    return torch.cat([squared_distances(part, codes).argmin(1) for part in latents.split(AT_A_TIME)])


def _errors(latents: Tensor, codes: Tensor) -> Tensor:
    """Squared distances of latents to their nearest codes: (N,)."""
    parts = [squared_distances(part, codes).amin(1) for part in latents.split(AT_A_TIME)]
    return torch.cat(parts).clamp(min=1e-12)


def _is_nearer(candidates: Tensor, latents: Tensor, distances: Tensor) -> Tensor:
    """Whether candidates (M, D) are nearer to any of latents (N, D) than at its squared distance (N,): (M,)."""
    parts = [(squared_distances(part, latents) < distances).any(1) for part in candidates.split(AT_A_TIME)]
    return torch.cat(parts)


def _k_means(latents: Tensor, size: int, fixed: Tensor, rng: torch.Generator) -> Tensor:
    """`size` codes (size, D), of which the first are `fixed` and stay."""
    if size == len(fixed):
        return fixed
    codes = torch.cat([fixed, latents[_draw(torch.ones(len(latents)), 1, rng).to(latents.device)]])
    errors = _errors(latents, codes)
    while len(codes) < size:  # in rounds of a sixteenth: k-means|| rather than one by one
        new = latents[_draw(errors, min(max(1, size // 16), size - len(codes)), rng)]
        errors = torch.minimum(errors, _errors(latents, new))
        codes = torch.cat([codes, new])
    for _ in range(10):
        counts, sums = _gather(latents, nearest(latents, codes), size)
        moved = counts > 0
        moved[: len(fixed)] = False
        codes[moved] = sums[moved] / counts[moved, None]
    return codes


def _gather(latents: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How many latents (N, D) have each id, and their sums: (size,), (size, D)."""
    counts = torch.bincount(ids, minlength=size).to(latents.dtype)
    return counts, torch.zeros(size, latents.shape[1], device=latents.device).index_add_(0, ids, latents)


def _draw(weights: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """`count` indices, drawn with replacement by `weights`."""
    return torch.multinomial(weights.cpu().double(), count, True, generator=rng).to(weights.device)
