"""Inputs from outside: the seven sets of the paper's appendix E, and images for outlier training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL.Image import Resampling
from torchvision import datasets

from cutmix_robustness.data.sources import ResidentImages
from shared_utils.images import image_files, read_image

FOLDERS = {  # the names of the archives that ODIN's authors published
    "tiny_imagenet_crop": "Imagenet",
    "tiny_imagenet_resize": "Imagenet_resize",
    "lsun_crop": "LSUN",
    "lsun_resize": "LSUN_resize",
    "isun": "iSUN",
}
NOISE_IMAGES = 10_000


def noise_sets(n: int, side: int, seed: int, device: torch.device | str) -> dict[str, ResidentImages]:
    """Uniform noise in [0, 1] and Gaussian noise N(0.5, 1) clipped to it."""
    rng = np.random.default_rng([seed, 7])
    uniform = rng.uniform(0, 1, (n, 3, side, side))
    gaussian = rng.normal(0.5, 1, (n, 3, side, side)).clip(0, 1)
    return {
        name: _unlabelled(np.round(255 * pixels).astype(np.uint8), f"{name} noise", device)
        for name, pixels in (("uniform", uniform), ("gaussian", gaussian))
    }


def open_sets(data_root: Path, device: torch.device | str, noise_only: bool = False) -> dict[str, ResidentImages]:
    """The seven sets for 32 x 32 models.

    Args:
        data_root: the five image sets are in its folder `ood`.
        device: where they go.
        noise_only: leave out the five image sets.

    Raises:
        FileNotFoundError: an image set is missing.
    """
    images = {} if noise_only else FOLDERS
    sets = {name: folder_of_images(data_root / "ood" / folder, name, device) for name, folder in images.items()}
    return sets | noise_sets(NOISE_IMAGES, 32, 0, device)


def folder_of_images(folder: Path, name: str, device: torch.device | str) -> ResidentImages:
    """All images below a folder, at 32 x 32 (resized where they are not).

    Raises:
        FileNotFoundError: no image is there.
        BrokenFile: an image that cannot be decoded.
    """
    paths = image_files(folder)[0] if folder.is_dir() else []
    if not paths:
        raise FileNotFoundError(f"{folder}: holds no image; see `cutmix-robustness data`")
    pixels = np.empty((len(paths), 3, 32, 32), np.uint8)
    for number, path in enumerate(paths):
        small = read_image(path).resize((32, 32), Resampling.BILINEAR)
        pixels[number] = np.asarray(small).transpose(2, 0, 1)
    return _unlabelled(pixels, name, device)


def outliers(kind: str, data_root: Path, side: int, seed: int, device: torch.device | str) -> ResidentImages:
    """Images that training is to give the uniform label: "svhn", "gan" (the user's own samples) or "uniform" noise.

    Raises:
        FileNotFoundError: they are missing, with what to do.
    """
    if kind == "uniform":
        return noise_sets(NOISE_IMAGES, side, seed + 1, device)["uniform"]
    if kind == "gan":
        return folder_of_images(data_root / "gan-samples", "GAN samples", device)
    try:
        svhn = datasets.SVHN(str(data_root), split="train")
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{data_root} lacks SVHN: run `cutmix-robustness data --download svhn --data-root {data_root}`"
        ) from error
    return _unlabelled(svhn.data, "SVHN, train", device)


def _unlabelled(pixels: np.ndarray, name: str, device: torch.device | str) -> ResidentImages:
    return ResidentImages(torch.from_numpy(pixels), torch.zeros(len(pixels), dtype=torch.int64), name, device=device)
