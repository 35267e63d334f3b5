"""Frozen feature networks: image in, feature row out. Those of the paper (arXiv 2002.09797), FID's, and all of timm's.

T4096 is "vgg16-fc2-relu", R64 is "random-vgg16-64". The paper does not say whether features are taken before
or after the ReLU, nor how random weights are initialised: `.provenance` says what was used; report it with every
number.
"""

from __future__ import annotations

import hashlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models import VGG, Inception_V3_Weights, VGG16_Weights, inception_v3, vgg16
from torchvision.transforms.v2 import functional as F

from prdc_metrics.data import Resize
from prdc_metrics.inception import empty_inception, pool_as_tensorflow
from shared_utils.preflight import Need, file

EMBEDDING_DIMS = {
    "vgg16-fc2-relu": 4096,  # T4096: ImageNet VGG16, second fully connected layer, after its ReLU
    "vgg16-fc2": 4096,  # the same before its ReLU
    "random-vgg16-64": 64,  # R64: untrained VGG16, fc2 replaced by a linear layer to 64
    "random-vgg16-4096": 4096,  # not in the paper: R64 at T4096's width
    "fid-inception": 2048,  # the network behind FID: TensorFlow's graph and its resize
    "inception-pool3": 2048,  # torchvision's InceptionV3, average pool; not FID's TensorFlow graph
}
TIMM = "timm:"
WEIGHTS = {  # where a known file can be downloaded; its name ends with the start of its sha256
    "vgg16-fc2-relu": VGG16_Weights.IMAGENET1K_V1.url,
    "vgg16-fc2": VGG16_Weights.IMAGENET1K_V1.url,
    "inception-pool3": Inception_V3_Weights.IMAGENET1K_V1.url,
    "fid-inception": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth",
}


@dataclass(frozen=True)
class Recipe:
    """What happens to images before a network sees them."""

    resize: Resize
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


def recipe(name: str, side: int | None = None) -> Recipe:
    """Preprocessing of a named embedding, see `load_embedding`; ValueError for an unknown name."""
    if name.startswith(TIMM):
        cfg = _timm_cfg(name)
        size = cfg.input_size[1:] if side is None else (side, side)
        method = cfg.interpolation if cfg.interpolation in ("bilinear", "bicubic") else "bicubic"
        return Recipe(Resize(tuple(size), method), tuple(cfg.mean), tuple(cfg.std))
    if name not in EMBEDDING_DIMS:
        raise ValueError(f"embedding {name!r} is not one of {', '.join(EMBEDDING_DIMS)}, nor {TIMM}MODEL")
    if name not in ("fid-inception", "inception-pool3"):
        return Recipe(Resize((side or 224, side or 224)))
    if side not in (None, 299):
        raise ValueError(f"{name} takes images of 299 x 299, got side={side}")
    if name == "inception-pool3":
        return Recipe(Resize((299, 299)), (0.5,) * 3, (0.5,) * 3)  # to [-1, 1], as the weights were trained
    return Recipe(Resize((299, 299), "tensorflow"), (128 / 255,) * 3, (128 / 255,) * 3)  # (byte - 128) / 128


class FrozenEmbedding(nn.Module):
    """A network in eval mode without gradients, its preprocessing inside.

    Attributes:
        name: as in `load_embedding`.
        resize: what happens to images of another size.
        provenance: name, weights (sha256 or "random"), seed, init, resize.
    """

    def __init__(self, trunk: nn.Module, provenance: dict[str, Any], recipe: Recipe):
        super().__init__()
        self.trunk, self.provenance, self.recipe = trunk, provenance, recipe
        self.name: str = provenance["name"]
        self.resize = recipe.resize
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenEmbedding:
        """Stay in eval mode, whatever the caller's model does."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) floating in [0, 1], any size -> (B, D): resized and normalised as the recipe says."""
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            found = f"{tuple(images.shape)} {images.dtype}"
            raise ValueError(f"images are (B, 3, H, W) floating, these are {found}")
        return self.trunk(F.normalize(self.resize(images), list(self.recipe.mean), list(self.recipe.std)))


def load_embedding(
    name: str,
    *,
    weights: str | Path | None = None,
    seed: int = 0,
    init: Literal["orthogonal", "torchvision"] = "orthogonal",
    side: int | None = None,
) -> FrozenEmbedding:
    """Build a frozen embedding on the CPU, in float32. Global random state is neither used nor changed.

    Args:
        name: one of `EMBEDDING_DIMS`; or "timm:MODEL", the features before the classifier of any model of timm, such as
            timm:vit_large_patch14_dinov2.lvd142m or timm:vit_large_patch14_clip_quickgelu_224.openai.
        weights: state dict: torchvision's of VGG16 or InceptionV3, pytorch-fid's or torch-fidelity's for
            fid-inception, the model's own for timm (also .safetensors). None looks in torch hub's cache
            ($TORCH_HOME/hub/checkpoints), but not for timm. Nothing is ever downloaded. Not for random embeddings.
        seed: of the random embeddings; the same seed gives the same weights.
        init: of the random embeddings. "orthogonal": convolutions orthogonal with gain sqrt(2), output layer
            orthogonal, zero bias (fc1: see `_init_orthogonal`). "torchvision": its VGG default.
        side: images are resized to side x side. None takes the network's own: 224 for VGG16 (it takes any from 32 on),
            299 for Inception (it takes no other), what timm has for the model (518 for DINOv2, published with 224).

    Raises:
        FileNotFoundError: weights missing; the message holds the line that fetches them.
        ValueError: unknown name or init, damaged weights, weights of another network.
        ModuleNotFoundError: timm is not installed.
    """
    provenance = embedding_provenance(name, weights=weights, seed=seed, init=init, side=side)
    if name.startswith("random-"):
        trunk = _random_vgg16(EMBEDDING_DIMS[name], seed, init)
    elif name.startswith(TIMM):
        trunk = _timm_model(name, _weights_path(name, weights), side)
    elif name == "fid-inception":
        net = empty_inception()
        _load_weights(net, _weights_path(name, weights), "pytorch-fid's Inception")
        trunk = pool_as_tensorflow(net)
    elif name == "inception-pool3":
        trunk = _pretrained_inception(_weights_path(name, weights))
    else:
        trunk = _pretrained_vgg16(_weights_path(name, weights), relu=name.endswith("-relu"))
    return FrozenEmbedding(trunk, provenance, recipe(name, side))


def embedding_provenance(
    name: str, *, weights: str | Path | None = None, seed: int = 0, init: str = "orthogonal", side: int | None = None
) -> dict[str, Any]:
    """What determines the features of `load_embedding` with these arguments, without building the network.

    Returns:
        The keys name, weights (the file's sha256, or "random"), seed (None with weights), init ("pretrained"
        with weights) and resize.

    Raises:
        FileNotFoundError, ValueError: as `load_embedding`, which alone looks into the weights file.
    """
    resized = str(recipe(name, side).resize)
    if not name.startswith("random-"):
        sha256 = _checked_sha256(_weights_path(name, weights), WEIGHTS.get(name))
        return {"name": name, "weights": sha256, "seed": None, "init": "pretrained", "resize": resized}
    if weights is not None:
        raise ValueError(f"embedding {name!r} is untrained and takes no weights, got {weights}")
    if init not in ("orthogonal", "torchvision"):
        raise ValueError(f"init {init!r} is neither 'orthogonal' nor 'torchvision'")
    return {"name": name, "weights": "random", "seed": seed, "init": init, "resize": resized}


# ---- random weights ----------------------------------------------------------------------------------------


def _random_vgg16(dim: int, seed: int, init: str) -> nn.Module:
    if init == "torchvision":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA as well
            net = vgg16(weights=None)
            head = nn.Linear(4096, dim)
            nn.init.normal_(head.weight, 0, 0.01)  # torchvision's rule for VGG's linear layers
            nn.init.zeros_(head.bias)
        return _vgg16_trunk(net, head)
    with torch.device("meta"):  # no default initialisation, no random draw
        net = vgg16(weights=None, init_weights=False)
        head = nn.Linear(4096, dim)
    trunk = _vgg16_trunk(net, head).to_empty(device="cpu")
    _init_orthogonal(trunk, torch.Generator().manual_seed(seed))
    return trunk


def _vgg16_trunk(net: VGG, head: nn.Linear) -> nn.Sequential:
    """VGG16 with `head` in place of fc2, without dropout: (B, 3, 224, 224) -> (B, head.out_features)."""
    return nn.Sequential(*net.features, net.avgpool, nn.Flatten(), net.classifier[0], net.classifier[1], head)


@torch.no_grad()
def _init_orthogonal(trunk: nn.Sequential, generator: torch.Generator) -> None:
    """Orthogonal weights and zero biases; the variance is preserved from layer to layer.

    fc1 (4096 x 25088) is drawn He-normal, of the same scale: its QR takes 20 s, and Gaussian rows of that
    length are orthogonal to within a cosine of about 0.006 already.
    """
    layers = [layer for layer in trunk if isinstance(layer, nn.Conv2d | nn.Linear)]
    *convolutions, fc1, head = layers
    for layer in convolutions:
        nn.init.orthogonal_(layer.weight, gain=math.sqrt(2), generator=generator)
    nn.init.kaiming_normal_(fc1.weight, nonlinearity="relu", generator=generator)
    nn.init.orthogonal_(head.weight, generator=generator)
    for layer in layers:
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# ---- pretrained weights ------------------------------------------------------------------------------------


def _pretrained_vgg16(path: Path, relu: bool) -> nn.Module:
    with torch.device("meta"):
        net = vgg16(weights=None, init_weights=False)
    _load_weights(net, path, "torchvision's vgg16")
    trunk = _vgg16_trunk(net, net.classifier[3])
    return trunk.append(nn.ReLU()) if relu else trunk


def _pretrained_inception(path: Path) -> nn.Module:
    with torch.device("meta"):
        net = inception_v3(weights=None, init_weights=False, transform_input=False)
    _load_weights(net, path, "torchvision's inception_v3")
    net.AuxLogits, net.fc = None, nn.Identity()  # forward now ends at the flattened pool3, (B, 2048)
    return net


def _load_weights(net: nn.Module, path: Path, architecture: str) -> None:
    """Fill a network built on the meta device; ValueError says briefly what does not fit."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = {key: tuple(value.shape) for key, value in state.items()}
    except Exception as error:  # zip, pickle and tensor errors of a damaged or unknown file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: cannot be read as a state dict ({type(error).__name__}: {reason})") from error
    expected = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    optional = {key for key in expected if key.endswith("num_batches_tracked")}  # absent before PyTorch 0.4.1
    problems = {
        "missing": expected.keys() - found.keys() - optional,
        "unexpected": found.keys() - expected.keys(),
        "of another shape": {key for key in expected.keys() & found.keys() if expected[key] != found[key]},
    }
    if any(problems.values()):
        lines = [f"{len(keys)} {what} ({', '.join(sorted(keys)[:2])})" for what, keys in problems.items() if keys]
        raise ValueError(f"{path}: these are not weights of {architecture}: {'; '.join(lines)}")
    net.load_state_dict(state, assign=True)
    net.float()


def _weights_path(name: str, weights: str | Path | None) -> Path:
    if weights is not None:
        return Path(weights)
    if name not in WEIGHTS:
        raise FileNotFoundError(f"embedding {name!r} needs its weights: pass weights (--weights FILE)")
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(WEIGHTS[name]).name


def weights_need(name: str) -> Need:
    """The weights of a pretrained embedding, in torch hub's cache."""
    path = _weights_path(name, None)
    return file(path, f"weights of {name}", f"fetch them with: {_fetch(path, WEIGHTS[name])}")


def _fetch(path: Path, url: str) -> str:
    return f"curl -fL --create-dirs -o '{path}' {url}"


def _checked_sha256(path: Path, url: str | None) -> str:
    """sha256 of the file. A file that has the name of a published one must have the hash that the name promises."""
    official = Path(url).name if url else ""  # vgg16-397923af.pth
    prefix = official.removesuffix(".pth").rpartition("-")[2]
    if not path.is_file():
        remedy = f" (sha256 {prefix}...); fetch them with: {_fetch(path, url)}" if url else ""
        raise FileNotFoundError(f"{path}: weights not found{remedy}")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if url and path.name == official and not sha256.startswith(prefix):
        raise ValueError(
            f"{path}: damaged, sha256 is {sha256[:8]}..., not {prefix}...; fetch again: {_fetch(path, url)}"
        )
    return sha256


# ---- timm --------------------------------------------------------------------------------------------------


def _timm_cfg(name: str) -> Any:
    try:
        import timm
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"embedding {name!r} needs timm: pip install timm") from None
    try:
        return timm.get_pretrained_cfg(name.removeprefix(TIMM), allow_unregistered=False)
    except RuntimeError as error:
        raise ValueError(f"embedding {name!r}: timm {timm.__version__} has no such model ({error})") from None


def _timm_model(name: str, path: Path, side: int | None) -> nn.Module:
    """The model without its classifier, filled from a file: (B, 3, H, W) -> (B, D)."""
    import timm
    from timm.models import load_checkpoint

    cfg = _timm_cfg(name)
    resized: dict[str, Any] = {"img_size": side} if side and cfg.fixed_input_size else {}
    with torch.random.fork_rng(devices=[]):
        net = timm.create_model(name.removeprefix(TIMM), pretrained=False, num_classes=0, **resized)
    convert = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)  # positions of another size
    try:
        keys = load_checkpoint(net, str(path), strict=False, filter_fn=convert)
    except Exception as error:  # zip, pickle, shape and key errors of a damaged or unknown file
        reason = str(error).split("\n")[0]
        raise ValueError(f"{path}: cannot be read as {name} ({type(error).__name__}: {reason})") from error
    heads = (cfg.classifier,) if isinstance(cfg.classifier, str) else tuple(cfg.classifier or ())
    foreign = [key for key in keys.unexpected_keys if not key.startswith(heads)]
    if keys.missing_keys or foreign:
        wrong = [
            f"{len(found)} {what} ({', '.join(sorted(found)[:2])})"
            for what, found in (("missing", keys.missing_keys), ("unexpected", foreign))
            if found
        ]
        raise ValueError(f"{path}: these are not weights of timm's {name.removeprefix(TIMM)}: {'; '.join(wrong)}")
    return net
