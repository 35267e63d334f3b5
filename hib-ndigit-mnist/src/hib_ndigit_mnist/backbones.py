"""Any timm or torchvision network as the encoder of a hedged embedding, in one module and one file."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hib_ndigit_mnist.checkpoint import load_file, save_file
from hib_ndigit_mnist.embedding import GaussianMixtureEmbedding
from hib_ndigit_mnist.evaluate import PAIR_TOLERANCE
from hib_ndigit_mnist.hedging import MatchProbability
from hib_ndigit_mnist.losses import VIBPairLoss
from hib_ndigit_mnist.mc_dropout import DropoutHead, mismatch_of_passes
from hib_ndigit_mnist.mc_infonce import MCInfoNCEHead, MCInfoNCELoss, inverse_concentration
from hib_ndigit_mnist.models import HedgedHead
from hib_ndigit_mnist.pfe import PFEHead, PFELoss, harmonic_mean_sigma
from hib_ndigit_mnist.settings import BackboneTraining

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation, RGB in [0, 1]


class HedgedModel(nn.Module):
    """A backbone, a head on its features, and the loss that holds a and b.

    Args:
        settings: the backbone, and the arguments of head and loss.
        pretrained: download the library's weights for the backbone.

    Raises:
        ValueError: an unknown backbone, one without a feature vector, or one of timm without timm installed.
        RuntimeError: its weights cannot be downloaded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, settings: BackboneTraining, pretrained: bool = False):
        super().__init__()
        self.settings = settings
        self.backbone, (mean, std) = build_backbone(settings.backbone, pretrained)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        with torch.no_grad():
            features = self.backbone.eval()(torch.zeros(1, 3, settings.image_size, settings.image_size))
        if features.ndim != 2:
            raise ValueError(f"backbone: {settings.backbone} returns {tuple(features.shape)}, not one vector per image")
        self.head, self.loss = self._head_and_loss(features.shape[1])

    def _head_and_loss(self, features: int) -> tuple[nn.Module, nn.Module]:
        s = self.settings
        if s.method == "pfe":
            return PFEHead(features, s.dim), PFELoss(s.beta, s.samples)
        if s.method == "mc-infonce":
            return MCInfoNCEHead(features, s.dim), MCInfoNCELoss(s.samples)
        loss = VIBPairLoss(s.beta, s.samples)
        if s.method == "mc-dropout":
            return DropoutHead(features, s.dim, s.dropout, s.samples), loss
        return HedgedHead(features, s.dim, s.components, s.method == "point"), loss

    @property
    def match(self) -> MatchProbability:
        """The module that holds a and b; AttributeError for mc-infonce, which has none."""
        return cast(MatchProbability, self.loss.match)

    def forward(self, x: Tensor) -> GaussianMixtureEmbedding:
        """RGB images (B, 3, H, W) floating in [0, 1] -> the embedding (B, C, D), float32."""
        return self.head(self.backbone((x - self.mean) / self.std))

    def uncertainty(self, embedding: GaussianMixtureEmbedding) -> Tensor:
        """Uncertainty of each image, (n,): eta by quadrature (deterministic), or the measure of a competing method."""
        if self.settings.method == "pfe":
            return harmonic_mean_sigma(embedding)
        if self.settings.method == "mc-dropout":
            return mismatch_of_passes(embedding, self.match)
        if self.settings.method == "mc-infonce":
            return inverse_concentration(embedding)
        return self.match.self_mismatch(embedding, method="quadrature", tolerance=PAIR_TOLERANCE)

    def save(self, path: Path) -> None:
        """Write settings and weights under a temporary name, then rename the file."""
        save_file(path, {"backbone": asdict(self.settings), "model": self.state_dict()})

    @classmethod
    def load(cls, path: Path) -> HedgedModel:
        """Load a saved model, in eval mode on the CPU; FileNotFoundError, or ValueError for a file of another kind."""
        state = load_file(path)
        try:
            given = {f.name: state["backbone"][f.name] for f in fields(BackboneTraining)}
            model = cls(BackboneTraining(**given))
            model.load_state_dict(state["model"])
        except (KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"{path}: not a model of this package ({str(error).splitlines()[0]})") from error
        return model.eval()


def build_backbone(name: str, pretrained: bool) -> tuple[nn.Module, tuple[Any, Any]]:
    """The network of "timm:NAME" or "torchvision:NAME" without its classifier, and its input's mean and deviation."""
    library, _, model = name.partition(":")
    try:
        if library == "timm" and model:
            import timm

            network: Any = timm.create_model(model, pretrained=pretrained, num_classes=0)
            return network, (network.default_cfg["mean"], network.default_cfg["std"])
        if library == "torchvision" and model:
            from torchvision.models import get_model

            network = get_model(model, weights="DEFAULT" if pretrained else None)
            linear = [each for each, layer in network.named_modules() if isinstance(layer, nn.Linear)]
            if not linear:
                raise ValueError(f"backbone: {name} has no linear classifier that could be removed")
            network.set_submodule(linear[-1], nn.Identity())
            return network, IMAGENET
    except ModuleNotFoundError as error:
        raise ValueError("backbone: timm is not installed: pip install timm") from error
    except OSError as error:  # the hub raises a subclass that is a ValueError, too
        raise RuntimeError(
            f"backbone: the weights of {name} could not be downloaded ({str(error).splitlines()[0]}); connect, or "
            "start from random weights: --no-pretrained, pretrained=False"
        ) from error
    except (ValueError, RuntimeError) as error:
        if "Unknown model" in str(error):
            raise ValueError(f"backbone: {library} has no model {model!r}") from error
        raise
    raise ValueError(f"backbone: expected timm:NAME or torchvision:NAME, got {name!r}")
