"""9-class ImageNet (section 4.3) with the authors' texture clusters, ImageNet-A, ImageNet-C and the stylised copy.

Expected below the data root: imagenet/train/<wnid>/*.JPEG and imagenet/val/<wnid>/*.JPEG, imagenet-a/<wnid>/*.jpg,
imagenet-c/<corruption>/<severity>/<wnid>/*.JPEG, and stylised-imagenet/train/<wnid>/*.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from rebias.data.images import ImageFiles
from shared_utils.images import image_files

CLASSES = ("dog", "cat", "frog", "turtle", "bird", "monkey", "fish", "crab", "insect")
WNIDS = {
    "dog": "n02085620 n02099601 n02106550 n02106662 n02110958",
    "cat": "n02123045 n02123159 n02123394 n02123597 n02124075",
    "frog": "n01641577 n01644373 n01644900",
    "turtle": "n01664065 n01665541 n01667114 n01667778 n01669191",
    "bird": "n01819313 n01820546 n01833805 n01843383 n01847000",
    "monkey": "n02486410 n02487347 n02488291 n02488702 n02492035",
    "fish": "n02607072 n02640242 n02641379 n02643566 n02655020",
    "crab": "n01978287 n01978455 n01980166 n01981276",
    "insect": "n02174001 n02177972 n02190166 n02206856 n02219486",
}
CLASS_OF_WNID = {wnid: number for number, name in enumerate(CLASSES) for wnid in WNIDS[name].split()}
CLUSTERS_FILE = "imagenet9_val_texture_clusters.csv"
CLUSTERS_SHA256 = "40a55e0a276d4d323a20baa358429ccccbbb873afdd5bc58c1298680ecc824ba"


def image_folder(root: str | Path, name: str, **options: Any) -> ImageFiles:
    """The nine classes' images of root/<wnid>/*, sorted by path; missing wnids are skipped.

    Raises:
        FileNotFoundError: no such folder, or none of the 42 wnids in it.
    """
    return ImageFiles(root, *_listed(Path(root)), name, **options)


def _listed(root: Path) -> tuple[list[str], Tensor]:
    """Names below the root, and labels."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: folder not found; it must hold one folder per WordNet id")
    folders = [root / wnid for wnid in sorted(CLASS_OF_WNID) if (root / wnid).is_dir()]
    paths = [path for folder in folders for path in image_files(folder)[0]]
    if not paths:
        raise FileNotFoundError(f"{root}: contains none of the 42 WordNet ids of 9-class ImageNet")
    names = [path.relative_to(root).as_posix() for path in paths]
    return names, torch.tensor([CLASS_OF_WNID[name.split("/")[0]] for name in names])


def train_set(data_root: Path, stylised: bool, **options: Any) -> ImageFiles:
    """ImageNet's training images of the nine classes, and on request their stylised copies."""
    if not stylised:
        return image_folder(data_root / "imagenet" / "train", "9-class ImageNet train", augment=True, **options)
    folders = ("imagenet/train", "stylised-imagenet/train")
    listed = [_listed(data_root / folder) for folder in folders]
    names = [f"{folder}/{name}" for folder, (own, _) in zip(folders, listed, strict=True) for name in own]
    labels = torch.cat([labels for _, labels in listed])
    return ImageFiles(data_root, names, labels, "9-class ImageNet train and stylised", augment=True, **options)


def validation_set(data_root: Path, **options: Any) -> tuple[ImageFiles, Tensor]:
    """The 2,100 validation images, and their texture clusters (3, n), joined by path.

    Raises:
        ValueError: the images are not those of the cluster labels.
    """
    data = image_folder(data_root / "imagenet" / "val", "9-class ImageNet val", **options)
    table = read_clusters()
    return data, join_clusters(data.names, table[~table.path.isin(data.skipped)])


def corrupted_sets(data_root: Path, **options: Any) -> dict[str, ImageFiles]:
    """ImageNet-C's corruptions and severities by name; empty if there is no folder (not in the paper)."""
    folders = sorted((data_root / "imagenet-c").glob("*/[1-5]"))
    names = {folder: f"{folder.parent.name} {folder.name}" for folder in folders}
    return {name: image_folder(folder, f"ImageNet-C {name}", **options) for folder, name in names.items()}


def read_clusters(path: Path | None = None) -> pd.DataFrame:
    """Cluster labels by image path (columns path, category, cluster1 ..); the authors' if no file is given.

    Raises:
        ValueError: the authors' file has another checksum, or a file lacks columns or has repeated paths.
    """
    if path is None:
        path = Path(str(files("rebias") / "assets" / CLUSTERS_FILE))
        if hashlib.sha256(path.read_bytes()).hexdigest() != CLUSTERS_SHA256:
            raise ValueError(f"{path.name}: the texture clusters shipped with the package were changed")
    table = pd.read_csv(path)
    if not {"path", "category", "cluster1"} <= set(table.columns):
        raise ValueError(f"{path}: needs the columns path, category, cluster1, ..., has {', '.join(table.columns)}")
    if table.path.duplicated().any():
        raise ValueError(f"{path}: {table.path[table.path.duplicated()].iloc[0]} is listed twice")
    return table


def join_clusters(names: list[str], table: pd.DataFrame) -> Tensor:
    """(R, n) int64 clusters of the named images, whatever the order of the files on disk.

    Raises:
        ValueError: images without a cluster or clusters without an image, with their numbers.
    """
    known = table.set_index("path")
    unknown, unused = [name for name in names if name not in known.index], len(known.index.difference(names))
    if unknown or unused:
        first = f", first {unknown[0]}" if unknown else ""
        raise ValueError(
            f"{len(names)} images but {len(known)} cluster labels: {len(unknown)} images have none{first}, "
            f"{unused} labels have no image"
        )
    columns = [column for column in known.columns if column.startswith("cluster")]
    return torch.from_numpy(known.loc[names, columns].to_numpy().T.copy()).long()
