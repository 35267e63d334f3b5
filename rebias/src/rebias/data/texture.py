"""Texture clusters (appendix F): k-means on the Gram matrices of early VGG-16 features."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torchvision.models import vgg16

from rebias.data.imagenet9 import CLASSES
from rebias.data.images import ImageFiles

LAYERS = {
    "relu1_2": 4,  # as the paper's text says: (64 x 64)-dimensional
    "conv3_3": 15,  # as the released code computes, before the ReLU: (256 x 256)-dimensional
}
CLUSTERS, BATCH_SIZE = 9, 1024


def texture_network(weights: Path, layer: str) -> nn.Module:
    """VGG-16's features up to a layer, with ImageNet weights from a state-dict file.

    Raises:
        ValueError: unknown layer, or a file without a VGG-16 state dict.
    """
    if layer not in LAYERS:
        raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {layer!r}")
    network = vgg16(weights=None)
    try:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise
    except Exception as error:  # zip, pickle, key and shape errors
        reason = str(error).split("\n")[0]
        raise ValueError(f"{weights}: is not a state dict of torchvision's vgg16 ({reason})") from error
    return network.features[: LAYERS[layer]].eval()


def gram_vectors(maps: Tensor) -> Tensor:
    """(B, C, H, W) feature maps -> (B, C * C) Gram matrices over C * H * W, flattened, of unit length."""
    flat = maps.flatten(2).float()  # (B, C, H * W)
    gram = flat @ flat.mT / flat[0].numel()
    return nn.functional.normalize(gram.flatten(1))


@torch.no_grad()
def _vectors(data: ImageFiles, network: nn.Module, batch_size: int) -> Iterator[np.ndarray]:
    network = network.to(data.device)
    for images, _ in data.batches(torch.arange(len(data)).split(batch_size)):
        yield gram_vectors(network(images)).cpu().numpy()


def texture_clusters(
    data: ImageFiles, network: nn.Module, *, repeats: int = 3, seed: int = 0, batch_size: int = 64
) -> pd.DataFrame:
    """Cluster a set's images by texture.

    Args:
        data: the images.
        network: images to feature maps; see `texture_network`.
        repeats: independent clusterings.
        seed: seed of the first clustering; the others count up from it.
        batch_size: images per forward pass.

    Returns:
        Columns path, category, cluster1 .. cluster<repeats>, as in the file that ships with the package.

    Raises:
        ValueError: fewer images than clusters.
    """
    if len(data) < CLUSTERS:
        raise ValueError(f"{CLUSTERS} clusters need at least {CLUSTERS} images, got {len(data)}")
    vectors = np.concatenate(list(_vectors(data, network, batch_size)))
    table = pd.DataFrame({"path": data.names, "category": [CLASSES[label] for label in data.labels.tolist()]})
    for number in range(repeats):
        kmeans = MiniBatchKMeans(CLUSTERS, batch_size=BATCH_SIZE, random_state=seed + number, n_init=3)
        table[f"cluster{number + 1}"] = kmeans.fit_predict(vectors)
    return table
