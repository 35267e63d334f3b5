"""From a batch of training images to a loss: every regularizer of both papers, and their combinations.

Order (section 4.1): noise, Cutout, mixing, then label smoothing of the mixed target; adversarial images and outliers
are appended to the batch, 1:1, in the same forward pass.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cutmix_robustness.attacks import fgsm
from cutmix_robustness.corruptions import SEVERITIES
from cutmix_robustness.cutmix import CutMix, MixedBatch, mixed_cross_entropy, unmixed
from cutmix_robustness.data.sources import ResidentImages
from cutmix_robustness.draws import generator_for
from cutmix_robustness.dropout import Cutout
from cutmix_robustness.mixup import ManifoldMix, Mixup, MixupCutMix
from cutmix_robustness.networks import Classifier
from cutmix_robustness.settings import MIXED_IN_THE_NETWORK, Settings


class Recipe:
    """Loss of one step.

    Args:
        settings: settings of the run.
        model: the classifier itself.
        forward: images to logits, through any wrapper of the classifier (precision, DDP).
        outliers: images for the uniform label, if the settings ask for them.
    """

    def __init__(
        self,
        settings: Settings,
        model: Classifier,
        forward: Callable[[Tensor], Tensor],
        outliers: ResidentImages | None = None,
    ):
        self.settings, self.model, self.forward, self.outliers = settings, model, forward, outliers
        self.generator = torch.Generator()
        fill = tuple(model.mean.flatten().tolist())  # 0 after normalisation
        self.cutout = Cutout(settings.cutout, fill, self.generator) if settings.cutout else None
        self.mix = self._mix()
        self.in_network: ManifoldMix | None = None
        if self.mix is not None and settings.mix in MIXED_IN_THE_NETWORK:
            point = settings.mix_point if settings.mix_point >= 0 else None
            self.in_network = ManifoldMix(model.network, model.network.points, self.mix, point, forward)

    def _mix(self) -> Mixup | CutMix | MixupCutMix | None:
        s = self.settings
        mixup = Mixup(s.alpha, s.prob, s.mode, s.partner, self.generator)
        cutmix = CutMix(
            s.alpha, s.prob, s.mode, s.partner, s.rounding, s.correct_lam, s.variant, s.fixed_size, self.generator
        )
        kinds: dict[str, Mixup | CutMix | MixupCutMix] = {
            "mixup": mixup,
            "cutmix": cutmix,
            "mixup+cutmix": MixupCutMix(mixup, cutmix),
        }
        return kinds.get(s.mix.replace("manifold-mixup", "mixup").replace("feature-cutmix", "cutmix"))

    @property
    def graphed(self) -> bool:
        """Whether the whole step is `mixed_loss` on the batch from `mixed`: without draws it can be replayed."""
        s = self.settings
        return self.in_network is None and s.branch == s.adversarial == s.outliers == "none"

    def mixed(self, images: Tensor, labels: Tensor, draw: tuple[int, ...], progress: float = 0.0) -> MixedBatch:
        """The batch that the network sees, mixed if the settings ask for it; arguments as in `loss`."""
        self.generator.manual_seed(generator_for(*draw, 2).initial_seed())
        images = _unit(images)
        if self.settings.gaussian_noise:
            images = self._add_noise(images)
        if self.cutout:
            images = self.cutout(images)
        if isinstance(self.mix, CutMix):
            self.mix.progress = progress
        mix = unmixed if self.in_network is not None else self.mix or unmixed
        return mix(images, labels)

    def mixed_loss(self, batch: MixedBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and statistics of a batch, as `loss` returns them."""
        logits = self.forward(batch.images).float()
        return _with_statistics(mixed_cross_entropy(logits, batch, self.settings.label_smoothing), logits, batch)

    def loss(
        self,
        images: Tensor,
        labels: Tensor,
        draw: tuple[int, ...],
        progress: float = 0.0,
        share: tuple[int, int] = (0, 1),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and training statistics of a batch.

        Args:
            images: (B, 3, H, W) uint8.
            labels: (B,) int64.
            draw: seed, epoch and number of the batch (and the rank, if the batch is its own), which determine every
                draw.
            progress: share of the training done, for scheduled CutMix.
            share: rank and world size, if the batch is the global one and this rank trains on its share.

        Returns:
            A scalar, and `loss` and `mixed_accuracy` (lam * acc_A + (1 - lam) * acc_B) detached.
        """
        s = self.settings
        batch = self.mixed(images, labels, draw, progress).shard(*share)
        if self.in_network is not None:
            logits, batch = self.in_network(batch.images, batch.target_a)
            return _with_statistics(mixed_cross_entropy(logits, batch, s.label_smoothing), logits, batch)
        if s.adversarial == s.outliers == "none":
            return self.mixed_loss(batch)
        clean, clean_labels = _unit(images[share[0] :: share[1]]), labels[share[0] :: share[1]]
        inputs = [batch.images]
        if s.adversarial != "none":
            inputs.append(self._attack(clean, clean_labels))
        if s.outliers != "none":
            inputs.append(self._draw_outliers(len(clean)))
        logits, *beside = self.forward(torch.cat(inputs)).float().split(len(clean))
        losses = [mixed_cross_entropy(logits, batch, s.label_smoothing)]
        if s.adversarial != "none":
            losses.append(F.cross_entropy(beside[0], clean_labels, label_smoothing=s.label_smoothing))
        if s.outliers != "none":
            losses.append(-F.log_softmax(beside[-1], 1).mean())  # cross-entropy with the uniform label
        loss = torch.stack(losses).mean()
        if s.adversarial == "logit-pairing":
            loss = loss + s.pairing_weight * (logits - beside[0]).square().mean()
        return _with_statistics(loss, logits, batch)

    def _add_noise(self, images: Tensor) -> Tensor:
        """Gaussian noise of CIFAR-C or ImageNet-C, its severity drawn for each image."""
        scale = "imagenet" if self.settings.dataset in ("imagenet", "image-folder", "cub") else "cifar"
        severity = torch.randint(5, (len(images),), generator=self.generator)
        sigma = torch.tensor(SEVERITIES[scale]["gaussian_noise"])[severity].to(images.device)
        noise = torch.randn(images.shape, generator=self.generator).to(images.device)
        return (images + sigma[:, None, None, None] * noise).clamp(0, 1)

    def _attack(self, images: Tensor, labels: Tensor) -> Tensor:
        """FGSM images of the model in evaluation mode."""
        self.model.eval()
        attacked = fgsm(self.model, images, labels)
        self.model.train()
        return attacked

    def _draw_outliers(self, n: int) -> Tensor:
        if self.outliers is None:
            raise ValueError(f"outliers {self.settings.outliers!r} need images for the uniform label, got none")
        index = torch.randint(len(self.outliers), (n,), generator=self.generator)
        images = self.outliers.images[index.to(self.outliers.images.device)]
        return _unit(images)


def _unit(images: Tensor) -> Tensor:
    return (images.float() / 255).contiguous(memory_format=torch.channels_last)


def _with_statistics(loss: Tensor, logits: Tensor, batch: MixedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    predicted = logits.argmax(1)
    right_a, right_b = ((predicted == target).float() for target in (batch.target_a, batch.target_b))
    accuracy = 100 * (batch.lam * right_a + (1 - batch.lam) * right_b).mean()
    return loss, {"loss": loss.detach(), "mixed_accuracy": accuracy}
