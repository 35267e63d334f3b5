"""From images to an (n, D) feature matrix, with a cache that is verified before use.

Every metric starts from these numbers, so features are float32 with tf32 off unless bf16 is asked for.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, TypeGuard, runtime_checkable

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from prdc_metrics.arithmetic import full_float32
from prdc_metrics.data import ImageArray, ImageFiles, Resize, as_rgb
from prdc_metrics.embeddings import FrozenEmbedding, embedding_provenance, load_embedding, recipe
from prdc_metrics.feature_files import subset
from shared_utils.files import whole_file
from shared_utils.images import BrokenFile
from shared_utils.logging import progress

logger = logging.getLogger(__name__)


@runtime_checkable
class MapStyle(Protocol):
    """A map-style Dataset with a length; torch's type does not promise one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Embedding = Callable[[Tensor], Tensor]
Source = str | Path | MapStyle | Tensor | np.ndarray


def extract_features(
    source: Source,
    embedding: str | Embedding = "vgg16-fc2-relu",
    *,
    weights: str | Path | None = None,
    seed: int = 0,
    init: Literal["orthogonal", "torchvision"] = "orthogonal",
    side: int | None = None,
    num_samples: int | None = None,
    sample_seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str | torch.device | None = None,
    precision: Literal["float32", "bf16"] = "float32",
    cache: str | Path | None = None,
    skip_broken: bool = False,
) -> Tensor:
    """Embed images (the paper's experiments on images; the embedding is part of every result).

    Args:
        source: an image folder or .zip; images (n, H, W), (n, 1, H, W), (n, 3, H, W) or uint8 (n, H, W, 3), uint8 or
            floating in [0, 1]; or a map-style Dataset of such images, PIL images, or (image, label).
        embedding: a name as in `load_embedding`, or a callable (B, 3, H, W) float32 in [0, 1] -> (B, D); an nn.Module
            is moved to `device`. Its `.size` (H, W), if any, is what images of different sizes are resized to.
        weights: weights of a named pretrained embedding, see `load_embedding`.
        seed: seed of a named random embedding.
        init: initialisation of a named random embedding.
        side: image size that a named embedding sees, see `load_embedding`.
        num_samples: keep a random subset of this many images; None, or more than there are, keeps all.
        sample_seed: seed of that subset.
        batch_size: images per forward pass.
        num_workers: processes that decode images; 0 decodes in this one.
        device: None: the nn.Module's device if it is not the CPU, else CUDA if available, else the CPU.
        precision: "float32" (tf32 off), or "bf16" autocast, which changes the features.
        cache: folder of stored features, keyed by the images' bytes, the embedding and the precision. Not for
            a Dataset, nor for a callable without a `.provenance` dict: these are computed each time.
        skip_broken: skip unreadable files of a folder, naming each in the log, instead of failing.

    Returns:
        (n, D) float32 on the CPU, rows in the order of the source.

    Raises:
        FileNotFoundError: folder or weights missing.
        ValueError: a source of another shape, dtype or range; an empty source; an embedding that is in training mode
            or does not return (B, D).
        BrokenFile: an unreadable image, named.
    """
    if precision not in ("float32", "bf16"):
        raise ValueError(f"precision {precision!r} is neither 'float32' nor 'bf16'")
    provenance: dict | None
    if isinstance(embedding, str):
        resize: Resize | None = recipe(embedding, side).resize
        provenance = embedding_provenance(embedding, weights=weights, seed=seed, init=init, side=side)
    else:
        resize, provenance = _resize_of(embedding), getattr(embedding, "provenance", None)
    images = _open_images(source, resize)
    indices = subset(len(images), num_samples, sample_seed)
    if len(indices) < len(images):
        logger.info("%d of %d images, drawn with seed %d", len(indices), len(images), sample_seed)
    entry = None
    if cache is not None and _can_cache(images, provenance):
        settings = dict(embedding=provenance, resize=str(resize), precision=precision, skip_broken=skip_broken)
        entry = CacheEntry(Path(cache), settings, images.content_digest(indices))
        if (features := entry.read()) is not None:
            return features
    device = _choose_device(embedding, device)
    if isinstance(embedding, str):
        embedding = load_embedding(embedding, weights=weights, seed=seed, init=init, side=side)
    loader = DataLoader(
        Subset(images, indices.tolist()),
        batch_size,
        num_workers=num_workers,
        collate_fn=Collate(resize),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise the loader would draw from the global generator
    )
    features, skipped = _embed(loader, len(indices), embedding, device, precision, skip_broken)
    if entry is not None:
        entry.write(features, skipped)
    return features


def _embed(
    loader: DataLoader, total: int, embedding: Embedding, device: torch.device, precision: str, skip_broken: bool
) -> tuple[Tensor, list[str]]:
    """All batches through the embedding -> (n, D) float32 on the CPU, and a line for every skipped file."""
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    if isinstance(embedding, nn.Module):
        if embedding.training:
            raise ValueError("embedding is in training mode: call .eval() first")
        embedding.to(device).to(memory_format=layout)
    rows, skipped = [], []
    amp = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    with full_float32(), torch.inference_mode(), amp, progress() as bar:
        task = bar.add_task("features", total=total)
        for images, errors in loader:
            for error in errors:
                if not skip_broken:
                    raise error
                logger.warning("skipped %s", error)
                skipped.append(str(error))
            if images is not None:
                images = images.to(device, non_blocking=True, memory_format=layout)  # (B, 3, H, W)
                rows.append(_checked_rows(embedding(images), len(images)))  # on the device: no sync per batch
            bar.advance(task, len(errors) + (0 if images is None else len(images)))
    if not rows:
        raise BrokenFile(f"all {len(skipped)} images are unreadable, the first: {skipped[0]}")
    if skipped:
        logger.warning("skipped %d of %d images as unreadable", len(skipped), total)
    return torch.cat(rows).cpu(), skipped  # (n, D); outside inference_mode: a normal tensor


def _checked_rows(features: Tensor, batch: int) -> Tensor:
    if features.ndim != 2 or len(features) != batch or not features.is_floating_point():
        found = f"{tuple(features.shape)} {features.dtype}"
        raise ValueError(f"an embedding must return floating (B, D); for B = {batch} this one returned {found}")
    return features.float()


def _choose_device(embedding: str | Embedding, device: str | torch.device | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    parameter = next(embedding.parameters(), None) if isinstance(embedding, nn.Module) else None
    if parameter is not None and parameter.device.type != "cpu":
        return parameter.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---- images in, batches out --------------------------------------------------------------------------------


class DatasetImages(Dataset):
    """The images of a map-style Dataset of images or (image, label, ...): (3, H, W) float32 in [0, 1]."""

    def __init__(self, dataset: MapStyle):
        self.dataset = dataset
        if len(dataset) == 0:
            raise ValueError(f"source: the {type(dataset).__name__} is empty")

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        item = self.dataset[index]
        return as_rgb(item[0] if isinstance(item, tuple | list) else item)


class Collate:
    """Items of a batch -> ((B, 3, H, W) or None, the errors among them); resizes only where sizes differ."""

    def __init__(self, resize: Resize | None):
        self.resize = resize

    def __call__(self, items: list[Tensor | BrokenFile]) -> tuple[Tensor | None, list[BrokenFile]]:
        """Images (3, h, w) or what was raised for them; see the class."""
        errors = [item for item in items if isinstance(item, BrokenFile)]
        images = [item for item in items if isinstance(item, Tensor)]
        if len({image.shape for image in images}) > 1:
            if self.resize is None:
                sizes = sorted({tuple(image.shape[1:]) for image in images})
                raise ValueError(f"images differ in size {sizes[:2]} and the embedding has no .size (H, W)")
            images = [self.resize(image) for image in images]
        return (torch.stack(images) if images else None), errors


def _resize_of(embedding: Embedding) -> Resize | None:
    if isinstance(embedding, FrozenEmbedding):
        return embedding.resize
    size = getattr(embedding, "size", None)
    return None if size is None else Resize(tuple(size))


def _open_images(source: Source, resize: Resize | None) -> ImageFiles | ImageArray | DatasetImages:
    if isinstance(source, str | Path):
        return ImageFiles(source, resize=resize, skip_broken=True)  # errors come back as items; `_embed` decides
    if isinstance(source, Tensor | np.ndarray):
        return ImageArray(source)
    if isinstance(source, MapStyle):
        return DatasetImages(source)
    raise ValueError(f"source: expected a folder, images or a Dataset, not {type(source).__name__}")


# ---- cache -------------------------------------------------------------------------------------------------


def _can_cache(
    images: ImageFiles | ImageArray | DatasetImages, provenance: object
) -> TypeGuard[ImageFiles | ImageArray]:
    if not isinstance(provenance, dict):
        logger.info("features are not cached: the embedding has no .provenance dict")
    elif isinstance(images, DatasetImages):
        logger.info("features are not cached: the contents of a Dataset are known only after reading all of it")
    else:
        return True
    return False


class CacheEntry:
    """One safetensors file: (n, D) float32 features, and what proves that they are complete and the right ones.

    Args:
        folder: the cache; created on first write.
        settings: JSON-able; everything besides the images that determines the features.
        content: digest of the images.
    """

    def __init__(self, folder: Path, settings: dict, content: str):
        text = json.dumps([settings, content], sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self.path = folder / f"{self.key}.safetensors"

    def read(self) -> Tensor | None:
        """The features, or None if there are none or the file is incomplete, which is logged."""
        if not self.path.exists():
            return None
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                metadata, features = file.metadata() or {}, file.get_tensor("features")
            skipped = json.loads(metadata.pop("skipped", "[]"))
        except Exception as error:  # whatever a parser raises for damaged bytes, compute again
            logger.warning("%s: cache file is damaged (%s), computing the features again", self.path, error)
            return None
        if metadata != self._metadata(features):
            logger.warning("%s: cache file does not match its key, computing the features again", self.path)
            return None
        for line in skipped:
            logger.warning("skipped %s", line)
        return features

    def write(self, features: Tensor, skipped: list[str]) -> None:
        """Other processes see the complete file or none."""
        metadata = self._metadata(features) | {"skipped": json.dumps(skipped)}
        with whole_file(self.path) as temporary:
            safetensors.torch.save_file({"features": features}, temporary, metadata=metadata)

    def _metadata(self, features: Tensor) -> dict[str, str]:
        n, d = features.shape
        sha256 = hashlib.sha256(features.contiguous().numpy().data).hexdigest()
        return {"key": self.key, "n": str(n), "D": str(d), "dtype": str(features.dtype), "sha256": sha256}
