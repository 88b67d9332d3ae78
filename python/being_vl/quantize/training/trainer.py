"""`being-vl quantizer train`: a small VQ-GAN from folders of images."""

import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import VQModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from being_vl.errors import CheckpointError, ConfigError
from being_vl.files import MANIFEST, write_aside
from being_vl.fingerprints import compute_fingerprint
from being_vl.quantize.models.tiled import (
    VQGAN,
    cut_tiles,
    decode_codes,
    encode_tiles,
    new_model,
    trained_parameters,
)
from being_vl.quantize.options import QuantizerTrainOptions
from being_vl.quantize.training.codebook import Codebook
from being_vl.quantize.training.crops import Crops, Group, Steps
from being_vl.quantize.training.distributed import average_gradients, averaged, processes, same_everywhere
from being_vl.quantize.training.losses import Discriminator, Perceptual, edge_loss, psnr, ssim

log = logging.getLogger(__name__)

START_TILES = 131072  # of the folder that is listed most often, at most
START_TILES_PER_CODE = 32
LEVELS = 0.5
SHOWN = 8  # held-out pictures of each folder that are shown
GAP = 4


def train_quantizer(options: QuantizerTrainOptions) -> Path:
    """Train a VQ-GAN and save it to `options.out`, for `load_quantizer`.

    The networks start as principal components of the tiles, and the codebook as k-means of those, which is a
    fair quantizer already; without that start, hours go by before it is as good. While the encoder learns, the
    codebook follows the moving averages of its latents, and unused codes are placed anew. Equal tiles of a picture
    count once, in the codebook and in the loss, or plain backgrounds would get most of the codes. The
    discriminator joins late. Everything random is a function of the seed and the step, so a run that was killed
    goes on from its checkpoint as if nothing had happened. Under torchrun the processes share each step's crops.

    Returns:
        `options.out`. Beside the quantizer it holds `log.jsonl` and `tensorboard/`, with PSNR, SSIM and the use of
        the codes on held-out pictures, and those pictures in `reconstructions/`.

    Raises:
        ImageError: if a folder has no image, or an image can't be read.
        CheckpointError: if `options.out` holds the checkpoint of other options.
        ConfigError: if a folder has too few images, the processes can't share a batch evenly, or a file of weights
            holds something else.
    """
    if (options.out / MANIFEST).is_file():
        log.info("%s: already finished", options.out)
        return options.out
    with processes(options.device) as (rank, ranks, device):
        trainer = Trainer(options, rank, ranks, device)
        trainer.run()
        if rank == 0:
            VQGAN(trainer.model, options.name, options.size, device).save_pretrained(options.out)
    return options.out


class Passed(NamedTuple):
    """What became of pictures (n, 3, side, side) on their way through the networks.

    Args:
        made: The pictures, decoded.
        error: `made` minus the pictures, by how much each tile counts.
        latents: (N, D) of the tiles, equal ones of a picture once.
        codes: (N, D), the codes nearest to them.
        ids: (N,), of the codes.
        weights: (N,), how much each counts; their sum is n.
        places: Which of them a tile of the pictures is, (n * tiles).
    """

    made: Tensor
    error: Tensor
    latents: Tensor
    codes: Tensor
    ids: Tensor
    weights: Tensor
    places: Tensor


class Trainer:
    """One run; `run` goes from the last checkpoint to the end.

    Args:
        options: What to do.
        rank: This process, from 0.
        ranks: How many share the work.
        device: Where this one computes.
    """

    def __init__(
        self, options: QuantizerTrainOptions, rank: int = 0, ranks: int = 1, device: str = "cpu"
    ) -> None:
        if options.batch_size % ranks:
            raise ConfigError(
                f"batch_size: {options.batch_size} cannot be shared evenly by {ranks} processes"
            )
        self.options, self.rank, self.device = options, rank, device
        self.crops = Crops(
            options.images, options.held_out, options.crop or options.size, options.tile, options.seed
        )
        self.steps = Steps(self.crops, options.batch_size, rank, ranks)
        torch.manual_seed(options.seed)
        self.model = new_model(
            options.codebook_size, options.code_dim, options.tile, options.width, options.layers
        ).to(device)
        self.discriminator = Discriminator().to(device)
        self.perceptual = Perceptual(options.vgg, options.lpips).to(device) if options.vgg else None
        weight = self.model.quantize.embedding.weight
        self.codebook = Codebook(weight.data, options.decay, options.dead, options.codebook == "ema")
        generator: list[dict[str, Any]] = [{"params": list(trained_parameters(self.model))}]
        if options.codebook == "gradient":
            generator.append({"params": [weight], "weight_decay": 0.0})
        self.optimizers = [
            torch.optim.AdamW(groups, options.learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
            for groups in (generator, [{"params": list(self.discriminator.parameters())}])
        ]
        self.done = 0
        self.encode, self.decode, self.judge = encode_tiles, decode_codes, self.discriminator.__call__
        if options.compile:
            self.encode = torch.compile(encode_tiles, dynamic=True)
            self.decode, self.judge = torch.compile(decode_codes), torch.compile(self.discriminator)

    def run(self) -> None:
        """Train to the last step, logging and saving."""
        options, first = self.options, self.rank == 0
        self._resume()
        with ExitStack() as stack:
            if first:
                options.out.mkdir(parents=True, exist_ok=True)
                _cut_log(options.out / "log.jsonl", self.done)
                path = options.out / "log.jsonl"
                file = stack.enter_context(path.open("a", encoding="utf-8", buffering=1))
                board = SummaryWriter(str(options.out / "tensorboard"), purge_step=self.done + 1)
                stack.callback(board.close)
            bar = stack.enter_context(
                tqdm(
                    total=options.steps,
                    initial=self.done,
                    unit="step",
                    desc="quantizer",
                    disable=None if first else True,
                )
            )
            for groups in self.steps.batches(range(self.done, options.steps), options.workers):
                entry: dict[str, Any] = self.step(groups)
                bar.update()
                save = self.done == options.steps or self.done % options.checkpoint_every == 0
                if not first or not (save or self.done % options.log_every == 0):
                    continue
                if save:
                    measured, sheets = self.measure()
                    entry |= measured
                    _show(sheets, options.out / "reconstructions", self.done, board)
                file.write(json.dumps({"step": self.done, **entry}) + "\n")
                for name, value in _flat(entry):
                    board.add_scalar(name, value, self.done)
                log.info("step %d/%d: %s", self.done, options.steps, entry)
                if save:
                    self._save()

    def step(self, groups: list[Group] | None = None) -> dict[str, float]:
        """One optimiser step of both networks, on this process's crops."""
        options = self.options
        groups = self.steps[self.done] if groups is None else groups
        if self.done == 0:
            self._start()
        for optimizer in self.optimizers:
            for parameters in optimizer.param_groups:
                parameters["lr"] = options.learning_rate * _schedule(self.done, options.steps)
        settled = self.done >= options.settle * options.steps
        adversarial = options.adversarial > 0 and self.done >= options.adversarial_start * options.steps
        count = sum(len(group.pixels) for group in groups)
        zero = torch.zeros((), device=self.device)
        terms = dict.fromkeys(
            ("pixels", "perceptual", "commitment", "codebook", "opinion", "discriminator"), zero
        )
        images = [group.pixels.to(self.device, non_blocking=True) for group in groups]
        passed = [self._pass(pixels, settled) for pixels in images]

        for pixels, p in zip(images, passed, strict=True):
            share = len(pixels) / count
            away = F.mse_loss(p.latents, p.codes.detach(), reduction="none").mean(1)
            learned = F.mse_loss(p.codes, p.latents.detach(), reduction="none").mean(1)
            terms["pixels"] = terms["pixels"] + share * p.error.abs().mean()
            terms["perceptual"] = terms["perceptual"] + share * self._perceptual(pixels, p)
            terms["commitment"] = terms["commitment"] + (p.weights * away).sum() / count
            terms["codebook"] = terms["codebook"] + (p.weights * learned).sum() / count
            if adversarial:
                with self._precision():
                    terms["opinion"] = terms["opinion"] - share * self.judge(p.made).float().mean()
        reconstruction = terms["pixels"] + options.perceptual * terms["perceptual"]
        loss = reconstruction + options.commitment * terms["commitment"]
        if options.codebook == "gradient" and not settled:
            loss = loss + terms["codebook"]
        if adversarial:
            weight = self._balance(reconstruction, terms["opinion"])
            loss = loss + options.adversarial * weight * terms["opinion"]
        self._optimize(0, loss)
        if adversarial:
            for pixels, p in zip(images, passed, strict=True):
                with self._precision():
                    real, fake = self.judge(pixels).float(), self.judge(p.made.detach()).float()
                hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
                terms["discriminator"] = terms["discriminator"] + len(pixels) / count * hinge
            self._optimize(1, terms["discriminator"])
        if not settled:
            chances = torch.cat([self._chances(g, p) for g, p in zip(groups, passed, strict=True)])
            latents = torch.cat([p.latents.detach() for p in passed])
            self.codebook.update(latents, torch.cat([p.ids for p in passed]), chances)
        self.done += 1

        names = ["pixels", "perceptual", "commitment"] + ["opinion", "discriminator"] * adversarial
        values = averaged(torch.stack([loss.detach(), *(terms[name].detach() for name in names)])).tolist()
        entry = dict(zip(["loss", *names], values, strict=True))
        return entry | ({"opinion_weight": float(weight)} if adversarial else {})

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """How well held-out pictures come back.

        Returns:
            Mean PSNR, in dB, and mean SSIM of each folder, and the share of the codes that all of them use; and some
            pictures of each folder beside what became of them, (3, height, width) of -1 to 1.
        """
        used = torch.zeros(self.options.codebook_size, dtype=torch.bool, device=self.device)
        measured: dict[str, dict[str, float]] = {"psnr": {}, "ssim": {}}
        sheets = {}
        for name, paths in self.crops.held_out.items():
            found: list[tuple[Tensor, Tensor]] = []
            shown: list[tuple[Tensor, Tensor]] = []
            for pixels in self.crops.whole(paths):
                p = self._pass(pixels.to(self.device), settled=True)
                used[p.ids] = True
                made = p.made.clamp(-1, 1)
                found.append((psnr(made, pixels.to(made)), ssim(made, pixels.to(made))))
                if len(shown) < SHOWN:
                    shown.append((pixels[0], made[0].cpu()))
            for kind, values in zip(measured, zip(*found, strict=True), strict=True):
                measured[kind][name] = round(float(torch.cat(values).mean()), 4)
            sheets[name] = _sheet(shown)
        return {**measured, "codes_used": round(float(used.float().mean()), 4)}, sheets

    def _pass(self, images: Tensor, settled: bool) -> Passed:
        """Through encoder, codebook and decoder; with `settled` nothing but the decoder gets a gradient."""
        every = cut_tiles(self.model, images)
        per_image = len(every) // len(images)
        image = torch.arange(len(images), device=every.device).repeat_interleave(per_image)
        # Equal tiles of a picture are encoded once.
        marked = torch.cat([every.flatten(1), image[:, None].to(every)], 1)
        tiles, places, counts = marked.unique(dim=0, return_inverse=True, return_counts=True)
        image = tiles[:, -1].long()
        distinct = torch.bincount(image, minlength=len(images))
        weights = 1 / distinct[image].float()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not settled), self._precision():
            latents = self.encode(self.model, tiles[:, :-1, None, None]).float()
        ids = self.codebook.nearest(latents.detach())
        learned = self.options.codebook == "gradient" and not settled
        codes = self.model.quantize.embedding(ids) if learned else self.codebook.weight[ids]
        quantized = latents + (codes - latents).detach()
        side = images.shape[-1] // self.options.tile
        with self._precision():
            made = self.decode(self.model, quantized[places].reshape(len(images), side, side, -1)).float()
        counts_as = (per_image * weights / counts)[places].reshape(len(images), 1, side, side)
        error = (made - images) * F.interpolate(counts_as, scale_factor=float(self.options.tile))
        return Passed(made, error, latents, codes, ids, weights, places)

    def _perceptual(self, images: Tensor, passed: Passed) -> Tensor:
        if self.perceptual is None:
            return edge_loss(passed.error)
        with self._precision():
            distance: Tensor = self.perceptual(passed.made, images).mean()
        return distance

    def _chances(self, group: Group, passed: Passed) -> Tensor:
        """A random number for each of the tiles that were encoded."""
        return torch.zeros(len(passed.ids), dtype=group.chances.dtype, device=self.device).scatter_reduce(
            0, passed.places, group.chances.to(self.device), "amin", include_self=False
        )

    def _precision(self) -> torch.autocast:
        bfloat16 = self.options.precision == "bfloat16"
        return torch.autocast(self.device.partition(":")[0], torch.bfloat16, enabled=bfloat16)

    def _balance(self, reconstruction: Tensor, opinion: Tensor) -> Tensor:
        """Makes both losses pull equally at the last layer (VQ-GAN, equation 7)."""
        last: Tensor = self.model.decoder.conv_out.weight
        pull, other = (
            averaged(torch.autograd.grad(loss, last, retain_graph=True)[0]).norm()
            for loss in (reconstruction, opinion)
        )
        weight: Tensor = (pull / (other + 1e-4)).clamp(max=1e4)
        return weight

    def _optimize(self, which: int, loss: Tensor) -> None:
        optimizer = self.optimizers[which]
        for each in self.optimizers:
            each.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(p for group in optimizer.param_groups for p in group["params"])
        optimizer.step()

    @torch.no_grad()
    def _start(self) -> None:
        """Principal components and k-means of the tiles of some crops; folders give as many as they take turns."""
        if self.rank == 0:
            options = self.options
            most = min(START_TILES, START_TILES_PER_CODE * options.codebook_size)
            crops = most / (self.crops.size // options.tile) ** 2
            turns = Counter(options.images)
            folders = [
                self._start_tiles(
                    options.images.index(folder), math.ceil(crops * count / max(turns.values()))
                )
                for folder, count in turns.items()
            ]
            least = min(map(len, folders))
            rng = torch.Generator().manual_seed(options.seed)
            start_linear(
                self.model,
                torch.cat([tiles[torch.randperm(len(tiles), generator=rng)[:least]] for tiles in folders]),
            )
            latents = [
                torch.cat([encode_tiles(self.model, part[:, :, None, None]) for part in tiles.split(4096)])
                for tiles in folders
            ]
            self.codebook.place(latents, round(options.reserved * options.codebook_size), rng)
        same_everywhere([*self.model.state_dict().values(), self.codebook.counts, self.codebook.sums])

    def _start_tiles(self, folder: int, crops: int) -> Tensor:
        """The different tiles (N, channels) of random crops of a folder."""
        rngs = (np.random.default_rng([self.options.seed, 2, folder, number]) for number in range(crops))
        pixels = (self.crops.draw(folder, rng)[None].to(self.device) for rng in rngs)
        tiles = torch.cat([cut_tiles(self.model, each).flatten(1) for each in pixels])
        different: Tensor = tiles.unique(dim=0)
        return different

    @property
    def _identity(self) -> str:
        """Of the options that decide the result."""
        free = {"out", "log_every", "device", "workers"}
        options = {name: value for name, value in asdict(self.options).items() if name not in free}
        return compute_fingerprint(options)

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
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
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


def _cut_log(path: Path, done: int) -> None:
    """Leave the lines that are whole and not beyond the checkpoint."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
    with write_aside(path) as aside:
        aside.write_text("".join(kept), encoding="utf-8")


def _flat(entry: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and numbers of a line of the log."""
    for name, value in entry.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{Path(part).name}", number) for part, number in value.items())
        else:
            yield name, value


def _sheet(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Pictures above what became of them, on white."""
    widest = max(a.shape[-1] for a, _ in pairs) + GAP
    cells = [
        torch.cat([F.pad(x, (0, widest - x.shape[-1], 0, widest - x.shape[-2]), value=1) for x in pair], 1)
        for pair in pairs
    ]
    return torch.cat(cells, 2)


def _show(sheets: dict[str, Tensor], folder: Path, step: int, board: SummaryWriter) -> None:
    """To a PNG in `folder`, and to TensorBoard."""
    folder.mkdir(parents=True, exist_ok=True)
    widest = max(sheet.shape[-1] for sheet in sheets.values())
    rows = [F.pad(sheet, (0, widest - sheet.shape[-1]), value=1) for sheet in sheets.values()]
    pixels = ((torch.cat(rows, 1).permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    Image.fromarray(pixels).save(folder / f"{step:07d}.png")
    board.add_image("reconstructions", pixels, step, dataformats="HWC")


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

    for module in encoder.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.weight.mul_(torch.eye(3)[1].outer(torch.eye(3)[1]))  # of one place, only the middle counts
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
    # The channels of the last layer that carry the codes; the others are the network's.
    codes = torch.arange(2 * dim)
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


def _schedule(step: int, steps: int) -> float:
    """Linear warm-up over 100 steps, then a cosine to 2 %."""
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / steps)) / 2)
