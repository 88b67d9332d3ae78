"""`being-vl quantizer train`: a small VQ-GAN from folders of images."""

import json
import logging
import math
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from being_vl.errors import CheckpointError, ConfigError
from being_vl.files import MANIFEST, digest, write_aside
from being_vl.quantize.images import find_images, fit_square, read_image
from being_vl.quantize.options import QuantizerTrainOptions
from being_vl.quantize.vqgan import (
    VQGAN,
    cut_tiles,
    decode_codes,
    encode_tiles,
    new_model,
    squared_distances,
    to_tensor,
    trained_parameters,
)

log = logging.getLogger(__name__)

HELD_OUT = 0.05  # share of each folder's images that is never trained on
HELD_OUT_MOST = 128
START_TILES = 65536  # at most, and of at most 64 batches
LEVELS = 0.5


def train_quantizer(options: QuantizerTrainOptions) -> Path:
    """Train a VQ-GAN and save it to `options.out`, for `load_quantizer`.

    The networks start as principal components of the tiles, and the codebook as k-means of those, which is a
    fair quantizer already; without that start, hours go by before it is as good. While the encoder learns, the
    codebook follows the moving averages of its latents, and unused codes are placed anew. Equal tiles of a batch
    count once, in the codebook and in the loss, or plain backgrounds would get most of the codes. The
    discriminator joins late. Everything random is a function of the seed and the step, so a run that was killed
    goes on from its checkpoint as if nothing had happened.

    Returns:
        `options.out`. Beside the quantizer it holds `log.jsonl`, with the held-out PSNR of each folder.

    Raises:
        ImageError: if a folder has no image, or an image can't be read.
        CheckpointError: if `options.out` holds the checkpoint of other options.
    """
    if (options.out / MANIFEST).is_file():
        log.info("%s: already finished", options.out)
        return options.out
    trainer = Trainer(options)
    trainer.run()
    model = VQGAN(trainer.model, options.name, options.size, options.device)
    model.save_pretrained(options.out)
    return options.out


class Pictures:
    """Seeded crops of folders of images, with a held-out part."""

    def __init__(self, folders: list[Path], size: int, seed: int) -> None:
        self.size = size
        self.train: list[list[Path]] = []
        self.held_out: dict[str, list[Path]] = {}
        for folder in folders:
            paths = [folder / key for key in find_images(folder)]
            if len(paths) < 2:
                raise ConfigError(f"{folder}: has one image; expected at least 2, one of them to be held out")
            order = np.random.default_rng([seed, 0]).permutation(len(paths))
            count = min(HELD_OUT_MOST, max(1, round(HELD_OUT * len(paths))))
            self.held_out[str(folder)] = [paths[i] for i in order[:count]]
            self.train.append([paths[i] for i in order[count:]])
        self._shrunk = lru_cache(4096)(self._read)

    def _read(self, path: Path) -> Image.Image:
        """An image, shrunk to four times the crop's size if its shorter side is longer than that."""
        image = read_image(path)
        scale = 4 * self.size / min(image.size)
        if scale >= 1:
            return image
        return image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
        )

    def batch(self, rng: np.random.Generator, count: int) -> Tensor:
        """`count` crops (count, 3, size, size) of -1 to 1, the folders in turn.

        The side of a crop is anything from `size` (or the image's shorter side, if that is less) to the
        image's shorter side, scaled to `size`.
        """
        crops = []
        for n in rng.permutation(count):
            paths = self.train[n % len(self.train)]
            image = self._shrunk(paths[rng.integers(len(paths))])
            most = min(image.size)
            side = round(math.exp(rng.uniform(math.log(min(self.size, most)), math.log(most))))
            left = int(rng.integers(image.width - side + 1))
            top = int(rng.integers(image.height - side + 1))
            box = (left, top, left + side, top + side)
            crops.append(np.asarray(image.resize((self.size,) * 2, Image.Resampling.BICUBIC, box)))
        return to_tensor(np.stack(crops))

    def fitted(self, paths: list[Path]) -> Tensor:
        """Whole images (n, 3, size, size) of -1 to 1, fitted as the quantizer does."""
        return to_tensor(np.stack([np.asarray(fit_square(read_image(path), self.size)) for path in paths]))


class Discriminator(nn.Sequential):
    """Says of each patch, about 22 pixels wide, whether it looks real: (n, 3, h, w) → (n, 1, h', w')."""

    def __init__(self, width: int = 32) -> None:
        super().__init__(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, 1, 1),
            nn.GroupNorm(8, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 3, 1, 1),
        )


class Codebook:
    """Moving averages of the latents of each code, and how often it is used."""

    def __init__(self, weight: Tensor, decay: float, dead: float) -> None:
        self.weight, self.decay, self.dead = weight, decay, dead
        self.counts = torch.ones(len(weight), device=weight.device)
        self.sums = weight.clone()

    def place(self, latents: Tensor, rng: torch.Generator) -> None:
        """Place all codes by k-means on `latents` (N, D), started as k-means++ does."""
        centres = latents[_draw(torch.ones(len(latents)), 1, rng)]
        nearest = squared_distances(latents, centres).squeeze(1)
        while len(centres) < len(self.weight):  # in rounds of a sixteenth: k-means|| rather than one by one
            count = min(max(1, len(self.weight) // 16), len(self.weight) - len(centres))
            new = latents[_draw(nearest.clamp(min=1e-12), count, rng)]
            nearest = torch.minimum(nearest, squared_distances(latents, new).amin(1)).clamp(min=0)
            centres = torch.cat([centres, new])
        for _ in range(10):
            counts, sums = _gather(latents, squared_distances(latents, centres).argmin(1), len(centres))
            used = counts > 0
            centres[used] = sums[used] / counts[used, None]
        counts, _ = _gather(latents, squared_distances(latents, centres).argmin(1), len(centres))
        self.counts.copy_(counts / len(latents) * 2048).clamp_(min=self.dead)
        self.weight.copy_(centres)
        self.sums.copy_(centres * self.counts[:, None])

    def update(self, latents: Tensor, ids: Tensor, rng: torch.Generator) -> None:
        """Follow the latents (N, D) that got `ids` (N,); place unused codes where the error is large."""
        counts, sums = _gather(latents, ids, len(self.weight))
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.weight.copy_(self.sums / self.counts.clamp(min=1e-6)[:, None])
        dead = (self.counts < self.dead).nonzero().squeeze(1)[: len(latents) // 16]
        if len(dead):
            errors = (latents - self.weight[ids]).square().sum(1)
            self.weight[dead] = latents[_draw(errors.clamp(min=1e-12), len(dead), rng)]
            self.counts[dead] = 2 * self.dead  # a while to prove itself
            self.sums[dead] = self.weight[dead] * self.counts[dead, None]


class Trainer:
    """One run; `run` goes from the last checkpoint to the end."""

    def __init__(self, options: QuantizerTrainOptions) -> None:
        self.options = options
        self.pictures = Pictures(options.images, options.size, options.seed)
        torch.manual_seed(options.seed)
        self.model = new_model(options.codebook_size, options.code_dim, options.tile, options.width)
        self.model.to(options.device)
        self.discriminator = Discriminator().to(options.device)
        self.codebook = Codebook(self.model.quantize.embedding.weight.data, options.decay, options.dead)
        self.optimizers = [
            torch.optim.AdamW(parameters, options.learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
            for parameters in (trained_parameters(self.model), self.discriminator.parameters())
        ]
        self.done = 0
        self.held_out = {name: self.pictures.fitted(paths) for name, paths in self.pictures.held_out.items()}

    def run(self) -> None:
        """Train to the last step, logging and saving."""
        options = self.options
        options.out.mkdir(parents=True, exist_ok=True)
        self._resume()
        with (
            (options.out / "log.jsonl").open("a", encoding="utf-8", buffering=1) as file,
            tqdm(total=options.steps, initial=self.done, unit="step", desc="quantizer", disable=None) as bar,
        ):
            while self.done < options.steps:
                entry = self.step()
                last = self.done == options.steps
                save = last or self.done % options.checkpoint_every == 0
                if save:
                    entry |= self.measure()
                if save or self.done % options.log_every == 0:
                    file.write(json.dumps({"step": self.done, **entry}) + "\n")
                    log.info("step %d/%d: %s", self.done, options.steps, entry)
                if save:
                    self._save()
                bar.update()

    def step(self) -> dict[str, float]:
        """One optimiser step of both networks."""
        options = self.options
        rng = np.random.default_rng([options.seed, 1, self.done])
        codes_rng = torch.Generator().manual_seed(int(rng.integers(2**62)))
        if self.done == 0:
            self._start(codes_rng)
        images = self.pictures.batch(rng, options.batch_size).to(options.device)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _schedule(self.done, options.steps)

        tiles, places, counts = cut_tiles(self.model, images).unique(
            dim=0, return_inverse=True, return_counts=True
        )
        settled = self.done >= options.settle * options.steps
        with torch.set_grad_enabled(not settled):
            latents = encode_tiles(self.model, tiles)
        ids = squared_distances(latents.detach(), self.codebook.weight).argmin(1)
        codes = self.codebook.weight[ids]
        commitment = F.mse_loss(latents, codes)
        quantized = latents + (codes - latents).detach()
        made = self._decode(quantized[places], images)
        error = (made - images) * self._per_pixel(len(places) / len(tiles) / counts[places], images)
        pixels, edges = error.abs().mean(), edge_loss(error)
        reconstruction = pixels + options.edges * edges
        loss = reconstruction + options.commitment * commitment
        entry = {"pixels": pixels.item(), "edges": edges.item(), "commitment": commitment.item()}

        adversarial = options.adversarial > 0 and self.done >= options.adversarial_start * options.steps
        if adversarial:
            opinion = -self.discriminator(made).mean()
            weight = self._balance(reconstruction, opinion)
            loss = loss + options.adversarial * weight * opinion
            entry |= {"opinion": opinion.item(), "opinion_weight": weight.item()}
        self._optimize(0, loss)
        entry["loss"] = loss.item()
        if adversarial:
            real, fake = self.discriminator(images), self.discriminator(made.detach())
            hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            self._optimize(1, hinge)
            entry["discriminator"] = hinge.item()
        if not settled:
            self.codebook.update(latents.detach(), ids, codes_rng)
        self.done += 1
        return entry

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Mean PSNR, in dB, of the held-out images of each folder, and the share of the codes they use."""
        used = torch.zeros(self.options.codebook_size, dtype=torch.bool)
        psnr = {}
        for name, images in self.held_out.items():
            errors = []
            for part in images.to(self.options.device).split(32):
                ids = squared_distances(self._latents(part), self.codebook.weight).argmin(1)
                used[ids.cpu()] = True
                made = self._decode(self.codebook.weight[ids], part).clamp(-1, 1)
                errors.append(((made - part) / 2).square().mean((1, 2, 3)))
            psnr[name] = round(float(-10 * torch.cat(errors).clamp(min=1e-10).log10().mean()), 3)
        return {"psnr": psnr, "codes_used": round(float(used.float().mean()), 4)}

    def _latents(self, images: Tensor) -> Tensor:
        return encode_tiles(self.model, cut_tiles(self.model, images))

    def _decode(self, codes: Tensor, images: Tensor) -> Tensor:
        side = images.shape[-1] // self.options.tile
        return decode_codes(self.model, codes.reshape(len(images), side, side, -1))

    def _per_pixel(self, of_tiles: Tensor, images: Tensor) -> Tensor:
        """Values of tiles (N,) in raster order for each of their pixels: (n, 1, height, width)."""
        tile = self.options.tile
        side = images.shape[-1] // tile
        return (
            of_tiles.reshape(len(images), 1, side, side).repeat_interleave(tile, 2).repeat_interleave(tile, 3)
        )

    def _balance(self, reconstruction: Tensor, opinion: Tensor) -> Tensor:
        """Makes both losses pull equally at the last layer (VQ-GAN, equation 7)."""
        last: Tensor = self.model.decoder.conv_out.weight
        (pull,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
        (other,) = torch.autograd.grad(opinion, last, retain_graph=True)
        weight: Tensor = (pull.norm() / (other.norm() + 1e-4)).clamp(max=1e4)
        return weight

    def _optimize(self, which: int, loss: Tensor) -> None:
        optimizer = self.optimizers[which]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def _start(self, rng: torch.Generator) -> None:
        """Principal components and k-means of the tiles of some batches."""
        options = self.options
        tiles_per_batch = options.batch_size * (options.size // options.tile) ** 2
        batches = (
            self.pictures.batch(np.random.default_rng([options.seed, 2, n]), options.batch_size)
            for n in range(min(64, -(-START_TILES // tiles_per_batch)))
        )
        tiles = torch.cat([cut_tiles(self.model, batch.to(options.device)) for batch in batches]).unique(
            dim=0
        )
        start_linear(self.model, tiles.flatten(1))
        latents = torch.cat([encode_tiles(self.model, part) for part in tiles.split(4096)])
        self.codebook.place(latents, rng)

    @property
    def _identity(self) -> str:
        """Of the options that decide the result."""
        free = {"out", "log_every", "device"}
        return digest({name: value for name, value in asdict(self.options).items() if name not in free})

    def _save(self) -> None:
        state = {
            "options": self._identity,
            "done": self.done,
            "networks": [self.model.state_dict(), self.discriminator.state_dict()],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "codebook": [self.codebook.counts, self.codebook.sums],
        }
        with write_aside(self.options.out / "checkpoint.pt") as aside:
            torch.save(state, aside)

    def _resume(self) -> None:
        path = self.options.out / "checkpoint.pt"
        if path.is_file():
            try:
                state = torch.load(path, map_location=self.options.device, weights_only=True)
            except Exception as error:
                raise CheckpointError(f"{path}: cannot be read ({error}); remove it to start anew") from error
            if state["options"] != self._identity:
                raise CheckpointError(
                    f"{path}: is of a training with other options; use them, or another folder for `out`"
                )
            for network, saved in zip((self.model, self.discriminator), state["networks"], strict=True):
                network.load_state_dict(saved)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.codebook.counts, self.codebook.sums = state["codebook"]
            self.done = state["done"]
        entries = self.options.out / "log.jsonl"
        lines = entries.read_text(encoding="utf-8").splitlines(keepends=True) if entries.is_file() else []
        with write_aside(entries) as aside:
            aside.write_text("".join(line for line in lines if _is_done(line, self.done)), encoding="utf-8")


def _is_done(line: str, done: int) -> bool:
    """Whether a line of the log is whole and not beyond the checkpoint."""
    return line.endswith("\n") and json.loads(line)["step"] <= done


@torch.no_grad()
def start_linear(model: VQModel, tiles: Tensor) -> None:
    """Make `model` the principal components of `tiles` (N, channels): encode projects, decode projects back.

    Every feature f goes through the networks as a pair of channels f and -f, because silu(f) - silu(-f) = f.
    Group norms would divide by the features' size; a pair of large constants in each group makes the divisor
    (nearly) constant. The residual blocks start as zero in the encoder and small in the decoder, and learn the
    rest.
    """
    encoder, decoder, dim = model.encoder, model.decoder, model.config.vq_embed_dim
    mean = tiles.mean(0)
    fade = _fade_levels(tiles.shape[1] // 3).to(tiles)
    _, sizes, axes = torch.linalg.svd((tiles - mean) @ fade, full_matrices=False)
    scale = (len(tiles) * dim) ** 0.5 / sizes[:dim].norm()  # mean square of the latents is 1
    width, groups = encoder.conv_in.out_channels, model.config.norm_num_groups
    per_group = width // groups
    positive = torch.arange(0, width, 2)
    constant = positive % per_group == 0
    pairs, constants = positive[~constant], positive[constant]
    features = min(len(pairs), len(axes))
    size = float(10 * scale * sizes[0] / len(tiles) ** 0.5)
    inward, outward = scale * axes @ fade, torch.linalg.solve(fade, axes[:dim].T) / scale

    for convolution in (encoder.conv_in, encoder.conv_out, model.quant_conv, model.post_quant_conv):
        nn.init.zeros_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    for sign, shift in ((1, 0), (-1, 1)):
        encoder.conv_in.weight[pairs[:features] + shift, :, 1, 1] = sign * inward[:features]
        encoder.conv_in.bias[pairs[:features] + shift] = -sign * (inward[:features] @ mean)
        encoder.conv_in.bias[constants + shift] = sign * size
        encoder.conv_out.weight[torch.arange(dim), pairs[:dim] + shift, 1, 1] = float(sign)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.GroupNorm) and not name.endswith("norm2"):
            module.weight.fill_(size * (2 / per_group) ** 0.5)
            for shift in (0, 1):
                module.weight[constants + shift] = 0
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    for convolution in (model.quant_conv, model.post_quant_conv):
        convolution.weight[:, :, 0, 0] = torch.eye(dim)

    for name, module in decoder.named_modules():
        if name.endswith("conv_y"):
            nn.init.zeros_(module.weight)
            nn.init.ones_(module.bias)
        if name.endswith("conv2"):
            module.weight.mul_(0.1)
            nn.init.zeros_(module.bias)
    codes = torch.arange(
        2 * dim
    )  # the channels of the last layer that carry the codes; the others are the network's
    norm = decoder.conv_norm_out
    nn.init.zeros_(norm.conv_b.weight)
    nn.init.zeros_(norm.conv_b.bias)
    norm.conv_y.bias[codes] = 0
    decoder.conv_out.weight.mul_(0.1)
    decoder.conv_out.weight[:, codes] = 0
    for sign, shift in ((1, 0), (-1, 1)):
        norm.conv_b.weight[codes[shift::2], torch.arange(dim), 0, 0] = float(sign)
        decoder.conv_out.weight[:, codes[shift::2], 1, 1] = sign * outward
    decoder.conv_out.bias.copy_(mean)


def _fade_levels(pixels: int) -> Tensor:
    """A matrix (3 * pixels, 3 * pixels) that multiplies the mean of each colour of a tile by `LEVELS`.

    Codes then tell shapes apart more, and slightly different plain backgrounds less, than by the error of pixels.
    """
    mean: Tensor = torch.block_diag(*[torch.full((pixels, pixels), 1 / pixels)] * 3)
    return torch.eye(3 * pixels) - (1 - LEVELS) * mean


def edge_loss(error: Tensor) -> Tensor:
    """Mean absolute difference between the errors of neighbours, of pixels and of means of 2×2 pixels."""
    loss = torch.zeros((), device=error.device)
    for _ in range(2):
        loss = loss + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        error = F.avg_pool2d(error, 2)
    return loss / 2


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over 100 steps, then a cosine to 2 %."""
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)


def _gather(latents: Tensor, ids: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How many latents (N, D) have each id, and their sums: (size,), (size, D)."""
    counts = torch.bincount(ids, minlength=size).to(latents.dtype)
    return counts, torch.zeros(size, latents.shape[1], device=latents.device).index_add_(0, ids, latents)


def _draw(weights: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """`count` indices, drawn with replacement by `weights`."""
    return torch.multinomial(weights.cpu().double(), count, True, generator=rng).to(weights.device)
