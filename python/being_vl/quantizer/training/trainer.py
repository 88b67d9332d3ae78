"""`being-vl quantizer train`: a small VQ-GAN from folders of images."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from being_vl.errors import CheckpointError, ConfigError, FingerprintError
from being_vl.files import MANIFEST, read_manifest, remove, write_aside, write_into
from being_vl.fingerprints import FINGERPRINT, check_fingerprint, write_fingerprint
from being_vl.options import fixed_options
from being_vl.outputs import check_folder, check_only_files, free_locks, lock_folder
from being_vl.progress import progress_bar, show_log_lines
from being_vl.quantizer.models.tiled import VQGAN, network_parameters, new_model
from being_vl.quantizer.training.autoencoder import Autoencoder, ForwardPass
from being_vl.quantizer.training.codebook import Codebook
from being_vl.quantizer.training.crops import CropBatch, CropDataset, Crops, fingerprint_folders
from being_vl.quantizer.training.distributed import (
    all_reduce_mean,
    average_gradients,
    broadcast_from_rank_0,
    process_group,
    wait_for_all_ranks,
)
from being_vl.quantizer.training.log import TrainingLog
from being_vl.quantizer.training.losses import Discriminator, Perceptual, edge_loss
from being_vl.quantizer.training.measure import measure, stack_sheets
from being_vl.quantizer.training.options import QuantizerTrainOptions
from being_vl.quantizer.training.start import start

log = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.pt"
KIND = "quantizer training"
"""How the fingerprint in an output folder names this job."""
OUTPUTS = (
    MANIFEST,
    "config.json",
    "diffusion_pytorch_model.safetensors",
    CHECKPOINT,
    "log.jsonl",
    "tensorboard",
    "reconstructions",
    FINGERPRINT,
)
"""All that a training writes into its folder."""


@show_log_lines()
@free_locks()
def train_quantizer(options: QuantizerTrainOptions) -> Path:
    """Train a VQ-GAN and save it to `options.out`, for `load_quantizer`.

    The networks start as principal components of the tiles, and the codebook as k-means of those, which is a
    fair quantizer already; without that start, hours go by before it is as good. While the encoder learns, the
    codebook follows the moving averages of its latents, and unused codes are placed again. Equal tiles of an image
    count once, in the codebook and in the loss, or plain backgrounds would get most of the codes. The
    discriminator joins late. Everything random is a function of the seed and the step, so a run that was killed
    goes on from its checkpoint as if nothing had happened. Under torchrun the ranks share each step's crops.

    Returns:
        `options.out`. Beside the quantizer it holds `log.jsonl` and `tensorboard/`, with PSNR, SSIM and the use of
        the codes on held-out images, and some of those images in `reconstructions/`.

    Raises:
        FingerprintError: if `options.out` holds what was made with other options or images, and `overwrite` is not
            set.
        OutputError: if it holds anything else, or another process is writing there.
        ImageError: if a folder has no image, or an image can't be read.
        CheckpointError: if the checkpoint is damaged.
        ConfigError: if a folder has too few images, the ranks can't share a batch evenly, or a file of weights
            holds something else.
    """
    with process_group(options.device) as (rank, ranks, device):
        fields = _fingerprint_fields(options)
        has_output = _check_folder(options, fields)
        wait_for_all_ranks()
        if has_output and (options.out / MANIFEST).is_file():
            log.info("%s: already finished", options.out)
            return options.out
        trainer = Trainer(options, rank, ranks, device)
        if rank == 0:
            lock_folder(options.out)
            # Another job may have claimed the folder meanwhile.
            if not _check_folder(options, fields):
                _claim_folder(options.out, fields)
        wait_for_all_ranks()
        trainer.run()
        if rank == 0:
            quantizer = VQGAN(trainer.model, options.name, options.size, device)
            with write_into(options.out) as folder:
                quantizer.save_pretrained(folder)
    return options.out


def _fingerprint_fields(options: QuantizerTrainOptions) -> dict[str, Any]:
    """What the quantizer follows from: options, and names and sizes of the images."""
    files = fingerprint_folders([*options.images, *options.held_out_images])
    return {"kind": KIND, **fixed_options(options), "files": files}


def _check_folder(options: QuantizerTrainOptions, fields: dict[str, Any]) -> bool:
    """Whether the output folder holds what these options and images made, finished or not.

    Raises:
        FingerprintError: if it holds something else that may not be replaced.
        OutputError: if it is the output of another kind of job, or none.
    """
    check_folder(
        options.out,
        *(KIND, "quantizer"),
        inputs=[*options.images, *options.held_out_images, options.perceptual.vgg, options.perceptual.lpips],
    )
    path = options.out / FINGERPRINT
    if (options.out / MANIFEST).is_file():
        read_manifest(options.out, "quantizer")
        if not path.is_file():
            raise FingerprintError(
                f"{options.out}: holds a quantizer that no training here made; choose another folder for `out`"
            )
    try:
        return check_fingerprint(path, fields)
    except FingerprintError:
        if not options.overwrite:
            raise
        return False


def _claim_folder(out: Path, fields: dict[str, Any]) -> None:
    """Remove what a training with other options left in the output folder, and say what this one follows from.

    Raises:
        OutputError: if there is something in the folders to remove that no training has written.
    """
    if (out / FINGERPRINT).is_file():
        patterns = {"tensorboard": r"events\.out\.tfevents\..*", "reconstructions": r"\d{7,}\.png"}
        for name, pattern in patterns.items():
            check_only_files(out / name, pattern)
        for name in OUTPUTS:
            remove(out / name)
    out.mkdir(parents=True, exist_ok=True)
    write_fingerprint(out / FINGERPRINT, fields)


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
        self.step = 0
        self.crops = Crops(
            options.images, options.held_out_images, options.crop_size, options.network.tile, options.seed
        )
        self.dataset = CropDataset(self.crops, options.batch_size, rank, ranks)
        self._build_networks()
        self._build_optimizers()

    def _build_networks(self) -> None:
        options, codes, device = self.options, self.options.codebook, self.device
        torch.manual_seed(options.seed)
        self.model = new_model(
            codes.size, codes.dim, options.network.tile, options.network.width, options.network.layers
        ).to(device)
        self.discriminator = Discriminator().to(device)
        self.discriminate = torch.compile(self.discriminator) if options.compile else self.discriminator
        files = options.perceptual
        self.perceptual = Perceptual(files.vgg, files.lpips).to(device) if files.vgg else None
        self.codebook = Codebook(
            self.model.quantize.embedding.weight.data,
            codes.ema_decay,
            codes.dead_threshold,
            is_moving=codes.update == "ema",
        )
        self.autoencoder = Autoencoder(
            self.model,
            self.codebook,
            bfloat16=options.precision == "bfloat16",
            learn_codes=codes.update == "gradient",
            compile=options.compile,
        )

    def _build_optimizers(self) -> None:
        generator: list[dict[str, Any]] = [{"params": list(network_parameters(self.model))}]
        if self.options.codebook.update == "gradient":
            generator.append({"params": [self.model.quantize.embedding.weight], "weight_decay": 0.0})
        discriminator = [{"params": list(self.discriminator.parameters())}]
        self.generator_optimizer, self.discriminator_optimizer = (
            torch.optim.AdamW(groups, self.options.learning_rate, betas=(0.9, 0.95), weight_decay=1e-4)
            for groups in (generator, discriminator)
        )
        self.optimizers = (self.generator_optimizer, self.discriminator_optimizer)

    def run(self) -> None:
        """Train to the last step; rank 0 logs, measures and saves."""
        options = self.options
        self._load_checkpoint()
        steps = self.dataset.iterate(range(self.step, options.steps), options.workers)
        if self.rank > 0:
            for batches in steps:
                self.train_step(batches)
            return
        with (
            TrainingLog(options.out, self.step, options.steps) as training_log,
            progress_bar(options.steps, "step", "quantizer", self.step) as bar,
        ):
            for batches in steps:
                metrics = self.train_step(batches)
                bar.update()
                self._record(metrics, training_log)

    def _record(self, metrics: dict[str, Any], training_log: TrainingLog) -> None:
        """Log a step if its turn has come, and make a checkpoint if that one's has."""
        is_checkpoint = self.step == self.options.steps or self.step % self.options.checkpoint.every == 0
        if is_checkpoint:
            measurement = measure(self.autoencoder, self.crops)
            metrics |= {"psnr": measurement.psnr, "ssim": measurement.ssim}
            metrics["codes_used"] = measurement.codes_used
            training_log.draw(self.step, stack_sheets(measurement.sheets))
        if is_checkpoint or self.step % self.options.logging.every == 0:
            training_log.write(self.step, metrics)
        if is_checkpoint:
            self._save_checkpoint()

    def train_step(self, batches: Sequence[CropBatch] | None = None) -> dict[str, float]:
        """One optimizer step of both networks, on this rank's crops; returns the losses, means over all ranks."""
        options = self.options
        batches = self.dataset[self.step] if batches is None else batches
        if self.step == 0:
            self._start()
        # Who learns in this step, and how fast.
        self._set_learning_rates()
        freeze_encoder = self.step >= options.encoder_share * options.steps
        is_adversarial = (
            options.adversarial.weight > 0 and self.step >= options.adversarial.start * options.steps
        )
        # Forward; then the networks learn, and the codebook follows the latents.
        images = [batch.pixels.to(self.device, non_blocking=True) for batch in batches]
        passes = [self.autoencoder(pixels, freeze_encoder) for pixels in images]
        losses, adversarial_weight = self._generator_step(images, passes, freeze_encoder, is_adversarial)
        if is_adversarial:
            losses["discriminator"] = self._discriminator_step(images, passes)
        if not freeze_encoder:
            self._update_codebook(batches, passes)
        self.step += 1
        # The log: all ranks' means, in one message.
        means = all_reduce_mean(torch.stack([loss.detach() for loss in losses.values()])).tolist()
        weight = {} if adversarial_weight is None else {"adversarial_weight": float(adversarial_weight)}
        return dict(zip(losses, means, strict=True)) | weight

    def _set_learning_rates(self) -> None:
        """Linear warm-up over 100 steps, then a cosine to 2 %."""
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * self.step / self.options.steps)) / 2
        rate = self.options.learning_rate * (min(1.0, (self.step + 1) / 100) * cosine)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate

    def _generator_step(
        self,
        images: list[Tensor],
        passes: list[ForwardPass],
        freeze_encoder: bool,
        is_adversarial: bool,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Update encoder and decoder, and codes that learn by gradients.

        Args:
            images: Crops of each size, (n, 3, side, side).
            passes: What became of them.
            freeze_encoder: The decoder alone learns.
            is_adversarial: The discriminator has joined.

        Returns:
            The losses by name, and with a discriminator the weight of its loss.
        """
        options = self.options
        # Each loss is a mean over all crops: those of one size count by their share.
        count = sum(map(len, images))
        names = ["pixels", "perceptual", "commitment", "codebook"] + ["generator"] * is_adversarial
        losses = dict.fromkeys(names, torch.zeros((), device=self.device))
        for pixels, forward in zip(images, passes, strict=True):
            for name, loss in self._losses(pixels, forward, count, is_adversarial).items():
                losses[name] = losses[name] + loss
        # Their sum; the discriminator's part pulls as strongly as the reconstruction's, times its weight.
        codebook_loss, weight = losses.pop("codebook"), None
        reconstruction = losses["pixels"] + options.perceptual.weight * losses["perceptual"]
        total = reconstruction + options.codebook.commitment * losses["commitment"]
        if options.codebook.update == "gradient" and not freeze_encoder:
            total = total + codebook_loss
        if is_adversarial:
            weight = self._adversarial_weight(reconstruction, losses["generator"])
            total = total + options.adversarial.weight * weight * losses["generator"]
        self._optimize(self.generator_optimizer, total)
        return {"loss": total} | losses, weight

    def _losses(
        self, pixels: Tensor, forward: ForwardPass, count: int, is_adversarial: bool
    ) -> dict[str, Tensor]:
        """What crops of one size, of `count` of all sizes, add to each of the generator's losses."""
        share = len(pixels) / count
        latent_errors = F.mse_loss(forward.latents, forward.codes.detach(), reduction="none").mean(1)
        code_errors = F.mse_loss(forward.codes, forward.latents.detach(), reduction="none").mean(1)
        losses = {
            "pixels": share * forward.error.abs().mean(),
            "perceptual": share * self._perceptual_loss(pixels, forward),
            "commitment": (forward.weights * latent_errors).sum() / count,
            "codebook": (forward.weights * code_errors).sum() / count,
        }
        if is_adversarial:
            with self.autoencoder.precision():
                scores = self.discriminate(forward.reconstructions).float()
            losses["generator"] = -(share * scores.mean())
        return losses

    def _perceptual_loss(self, images: Tensor, forward: ForwardPass) -> Tensor:
        if self.perceptual is None:
            return edge_loss(forward.error)
        with self.autoencoder.precision():
            distance: Tensor = self.perceptual(forward.reconstructions, images).mean()
        return distance

    def _adversarial_weight(self, reconstruction: Tensor, generator: Tensor) -> Tensor:
        """The weight with which both losses pull equally at the last layer (VQ-GAN, equation 7)."""
        last_layer: Tensor = self.model.decoder.conv_out.weight
        pull, adversarial_pull = (
            all_reduce_mean(torch.autograd.grad(loss, last_layer, retain_graph=True)[0]).norm()
            for loss in (reconstruction, generator)
        )
        weight: Tensor = (pull / (adversarial_pull + 1e-4)).clamp(max=1e4)
        return weight

    def _discriminator_step(self, images: list[Tensor], passes: list[ForwardPass]) -> Tensor:
        """Update the discriminator; returns its hinge loss."""
        count = sum(map(len, images))
        total = torch.zeros((), device=self.device)
        for pixels, forward in zip(images, passes, strict=True):
            with self.autoencoder.precision():
                real_scores = self.discriminate(pixels).float()
                fake_scores = self.discriminate(forward.reconstructions.detach()).float()
            hinge = F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()
            total = total + len(pixels) / count * hinge
        self._optimize(self.discriminator_optimizer, total)
        return total

    def _optimize(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        for network_optimizer in self.optimizers:
            network_optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(p for group in optimizer.param_groups for p in group["params"])
        optimizer.step()

    def _update_codebook(self, batches: Sequence[CropBatch], passes: list[ForwardPass]) -> None:
        # Of equal tiles, which were encoded once, the least of their random numbers counts.
        chances = [
            torch.zeros(len(forward.ids), dtype=batch.chances.dtype, device=self.device).scatter_reduce(
                0, forward.places, batch.chances.to(self.device), "amin", include_self=False
            )
            for batch, forward in zip(batches, passes, strict=True)
        ]
        latents = torch.cat([forward.latents.detach() for forward in passes])
        self.codebook.update(latents, torch.cat([forward.ids for forward in passes]), torch.cat(chances))

    def _start(self) -> None:
        """Set weights and codes in rank 0, and give them to all."""
        if self.rank == 0:
            start(self.model, self.codebook, self.crops, self.options)
        tensors = [*self.model.state_dict().values(), self.codebook.counts, self.codebook.sums]
        broadcast_from_rank_0(tensors)

    def _save_checkpoint(self) -> None:
        state = {
            "step": self.step,
            "networks": [self.model.state_dict(), self.discriminator.state_dict()],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "codebook": [self.codebook.counts, self.codebook.sums],
        }
        # Into a file of ours: torch's own would not say why it can't be written.
        with write_aside(self.options.out / CHECKPOINT) as temporary_path, temporary_path.open("wb") as file:
            torch.save(state, file)

    def _load_checkpoint(self) -> None:
        path = self.options.out / CHECKPOINT
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise CheckpointError(
                f"{path}: cannot be read ({error}); remove it to start from the beginning"
            ) from error
        for network, tensors in zip((self.model, self.discriminator), state["networks"], strict=True):
            network.load_state_dict(tensors)
        for optimizer, fields in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(fields)
        self.codebook.counts, self.codebook.sums = state["codebook"]
        self.step = state["step"]
