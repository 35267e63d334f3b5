"""Out-of-distribution inputs: the seven sets of the paper's appendix E, quick ones, and images for outlier training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torchvision import datasets

from cutmix_robustness.data.sources import ResidentImages
from shared_utils.images import BrokenFile, image_files, read_image
from shared_utils.logging import get_logger

logger = get_logger("cutmix-robustness")

FOLDERS = {  # the names of the archives that ODIN's authors published
    "tiny_imagenet_crop": "Imagenet",
    "tiny_imagenet_resize": "Imagenet_resize",
    "lsun_crop": "LSUN",
    "lsun_resize": "LSUN_resize",
    "isun": "iSUN",
}


def noise_sets(n: int, side: int, seed: int, device: torch.device | str) -> dict[str, ResidentImages]:
    """Uniform noise in [0, 1] and Gaussian noise N(0.5, 1) clipped to it."""
    rng = np.random.default_rng([seed, 7])
    uniform = rng.uniform(0, 1, (n, 3, side, side))
    gaussian = rng.normal(0.5, 1, (n, 3, side, side)).clip(0, 1)
    return {
        name: _unlabelled(np.round(255 * pixels).astype(np.uint8), f"{name} noise", device)
        for name, pixels in (("uniform", uniform), ("gaussian", gaussian))
    }


def open_sets(
    data_root: Path, n_noise: int, device: torch.device | str, skip_broken: bool = False
) -> dict[str, ResidentImages]:
    """The paper's seven sets for 32 x 32 models: five of images in the data root's folder `ood`, two of noise.

    Raises:
        FileNotFoundError: an image set is missing.
    """
    sets = {
        name: folder_of_images(data_root / "ood" / folder, name, device, skip_broken)
        for name, folder in FOLDERS.items()
    }
    return sets | noise_sets(n_noise, 32, 0, device)


def digits_and_noise(data_root: Path, n_noise: int, device: torch.device | str) -> dict[str, ResidentImages]:
    """MNIST's test digits, padded with black to 32 x 32, and the two kinds of noise: sets that take only seconds.

    Raises:
        FileNotFoundError: MNIST is missing or damaged; the message says what to do.
    """
    digits = F.pad(mnist_digits(data_root, train=False), [2] * 4)[:, None].expand(-1, 3, -1, -1).numpy()
    return {"mnist": _unlabelled(digits, "MNIST, test", device)} | noise_sets(n_noise, 32, 0, device)


def mnist_digits(data_root: Path, train: bool) -> torch.Tensor:
    """MNIST's images, (N, 28, 28) uint8.

    Raises:
        FileNotFoundError: MNIST is missing or damaged; the message says what to do.
    """
    try:
        return datasets.MNIST(str(data_root), train=train).data
    except (RuntimeError, ValueError, AssertionError) as error:  # torchvision's for missing and for truncated files
        fetch = f"cutmix-robustness data --download mnist --data-root {data_root}"
        raise FileNotFoundError(f"{data_root}: MNIST is missing or damaged; run `{fetch}`") from error


def folder_of_images(folder: Path, name: str, device: torch.device | str, skip_broken: bool = False) -> ResidentImages:
    """All images below a folder, resized to 32 x 32 if needed.

    Raises:
        FileNotFoundError: there are no images.
        BrokenFile: an image cannot be decoded and is not to be skipped.
    """
    paths = image_files(folder)[0] if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"{folder}: contains no images; see `cutmix-robustness data`")
    pixels = []
    for path in paths:
        try:
            small = read_image(path).resize((32, 32), Resampling.BILINEAR)
        except BrokenFile as error:
            if not skip_broken:
                raise
            logger.warning("skipped: %s", error)
            continue
        pixels.append(np.asarray(small).transpose(2, 0, 1))
    return _unlabelled(np.stack(pixels), name, device)


def outliers(kind: str, data_root: Path, side: int, seed: int, device: torch.device | str) -> ResidentImages:
    """Images that are trained with the uniform label: "svhn", "gan" (the user's own samples) or "uniform" noise.

    Raises:
        FileNotFoundError: they are missing; the message says what to do.
        BrokenFile: they cannot be read.
    """
    if kind == "uniform":
        return noise_sets(10_000, side, seed + 1, device)["uniform"]
    if kind == "gan":
        return folder_of_images(data_root / "gan-samples", "GAN samples", device)
    path = data_root / "train_32x32.mat"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: file not found; run `cutmix-robustness data --download svhn --data-root {data_root}`"
        )
    try:
        pixels = loadmat(path)["X"].transpose(3, 2, 0, 1)  # from (32, 32, 3, N)
    except (OSError, ValueError, MatReadError) as error:
        raise BrokenFile(f"{path}: {error}; download it again") from None
    return _unlabelled(np.ascontiguousarray(pixels), "SVHN, train", device)


def _unlabelled(pixels: np.ndarray, name: str, device: torch.device | str) -> ResidentImages:
    return ResidentImages(torch.from_numpy(pixels), torch.zeros(len(pixels), dtype=torch.int64), name, device=device)
