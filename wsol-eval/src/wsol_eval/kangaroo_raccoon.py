"""163 photographs of kangaroos and 200 of raccoons, each with boxes: two public repositories as one data set.

One more kangaroo, 00090.jpg, is cut off in the repository itself and is left out.
The splits are drawn once, class by class, and never again: train (train-weaksup) is half of a class, val
(train-fullsup) an eighth, test the rest. Nothing is copied: the clones themselves are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from shared_utils.preflight import Need
from wsol_eval.build import build_metadata
from wsol_eval.metadata import Metadata

DATASET = "kangaroo-raccoon"
SPLIT_SEED = 0
PARTS = (("train", 1 / 2), ("val", 1 / 8))  # of a class; test has the others


@dataclass(frozen=True)
class Clone:
    """A repository with images/ and a folder of VOC's XML."""

    folder: str
    url: str
    commit: str
    annotations: str
    checksum: str
    """see `checksums`"""

    @property
    def remedy(self) -> str:
        """The commands that make the clone, run in the data root."""
        return f"git clone {self.url} && git -C {self.folder} checkout {self.commit}"


CLONES = (  # one class each
    Clone(
        "kangaroo",
        "https://github.com/experiencor/kangaroo",
        "882bbbd75ba49cb8cf9393e06d88ebaec293af32",
        "annots",
        "e5141540e0f35df2d6053a8e26ad192b984146ba7ee5f7521116ff09554c4eb4",
    ),
    Clone(
        "raccoon_dataset",
        "https://github.com/datitran/raccoon_dataset",
        "93938849301895fb73909842ba04af9b602f677a",
        "annotations",
        "43578c20d93bd21edd44943ff134b9698be3faf3c7ccfab5e4efb98053a16038",
    ),
)


@lru_cache(maxsize=8)
def split_metadata(data_root: Path) -> dict[str, Metadata]:
    """Metadata by split; ids are paths under the data root.

    Raises:
        FileNotFoundError: a clone is not there.
        ValueError: an image without XML, or an XML without image, without a box or of an image of another size.
    """
    need = clones_needed(data_root)
    if not need.met:
        raise FileNotFoundError(f"{need.what}: {need.remedy}")
    found = {split: Metadata([], {}) for split in ("train", "val", "test")}
    for label, clone in enumerate(CLONES):
        root = data_root / clone.folder
        whole = build_metadata(root, root / clone.annotations, skip_broken=True)[""]
        names = [name for name in whole.image_ids if name.startswith("images/")]
        bare = [name for name in names if name not in whole.boxes]
        if bare:
            wanted = root / clone.annotations / f"{Path(bare[0]).stem}.xml"
            raise ValueError(f"{root / bare[0]}: it has no box; expected {wanted} with one (commit {clone.commit[:7]})")
        for split, chosen in _parts(len(names)):
            for name in (names[place] for place in chosen):
                key = f"{clone.folder}/{name}"
                part = found[split]
                part.image_ids.append(key)
                part.class_labels[key] = label
                part.image_sizes[key], part.boxes[key] = whole.image_sizes[name], whole.boxes[name]
    return found


def _parts(count: int) -> Iterator[tuple[str, list[int]]]:
    """Name and sorted places of each split, of a class with so many images."""
    order, begin = np.random.default_rng(SPLIT_SEED).permutation(count), 0
    for split, share in PARTS:
        end = begin + int(share * count)
        yield split, sorted(order[begin:end].tolist())
        begin = end
    yield "test", sorted(order[begin:].tolist())


def clones_needed(data_root: Path) -> Need:
    """Both clones, in one line with the commands that make them."""
    folders = [data_root / clone.folder / part for clone in CLONES for part in ("images", clone.annotations)]
    missing = [folder for folder in folders if not folder.is_dir()]
    what = f"photographs of kangaroos and raccoons ({missing[0] if missing else data_root})"
    commands = " && ".join([f"cd '{data_root}'", *(clone.remedy for clone in CLONES)])
    return Need(what, commands, not missing)


@lru_cache(maxsize=8)
def checksums(data_root: Path) -> dict[str, str]:
    """SHA-256 over names and bytes of all images and XML files of each clone."""
    found = {}
    for clone in CLONES:
        digest, root = hashlib.sha256(), data_root / clone.folder
        for part in ("images", clone.annotations):
            for path in sorted((root / part).iterdir()):
                digest.update(f"{part}/{path.name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
        found[clone.folder] = digest.hexdigest()
    return found


def other_files(data_root: Path) -> list[str]:
    """A phrase for each clone whose files are not those of its commit."""
    known = checksums(data_root)
    return [
        f"other files of {clone.folder} than at commit {clone.commit[:7]}"
        for clone in CLONES
        if known[clone.folder] != clone.checksum
    ]
