"""Tiny archives in the layout of the real ones, with their quirks: examples of a data root, and for rehearsals."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rebias.data.action import CLASSES as ACTIONS
from rebias.data.imagenet9 import CLASS_OF_WNID, read_clusters

KINDS = ("rgb", "grey", "cmyk", "exif", "png")  # in ImageNet all of these are named .JPEG


def write(root: Path) -> None:
    """Write every set that the project reads below root; ten seconds and 11 MB."""
    write_mnist(root)
    wnids = sorted(CLASS_OF_WNID)
    write_images(root / "imagenet" / "train", wnids, per_class=2)
    write_images(root / "imagenet" / "train", wnids[:1], per_class=1, prefix="a name with spaces é_")
    write_files(root / "imagenet" / "val", read_clusters().path.tolist())
    write_images(root / "imagenet-a", wnids[::2], per_class=1, prefix="0.00_", suffix=".jpg")  # not every wnid is there
    (root / "imagenet-a" / "README.txt").write_text("ImageNet-A")
    write_images(root / "stylised-imagenet" / "train", wnids, per_class=1)
    write_images(root / "imagenet-c" / "fog" / "3", wnids, per_class=1)
    for hidden in (".DS_Store", "._n01641577_0.JPEG", ".ipynb_checkpoints/n01641577_0.JPEG"):
        place = root / "imagenet" / "train" / "n01641577" / hidden
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(b"no image")
    for folder, csv, split, labels in (
        ("kinetics", "train.csv", "train", ACTIONS),
        ("kinetics", "val.csv", "val", ACTIONS[1:4]),
        ("mimetics", "mimetics.csv", "", ACTIONS[2:5]),
    ):
        write_videos(root / folder / csv, root / folder / split, labels)


def write_mnist(root: Path, n_train: int = 120, n_test: int = 60) -> None:
    """MNIST's four idx files with scikit-learn's digits, enlarged to 28 x 28; labels 0 .. 9 in turn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    members = [np.flatnonzero(digits.target == label) for label in range(10)]
    for part, n, first in (("train", n_train, 0), ("t10k", n_test, 80)):
        labels = (np.arange(n) % 10).astype(np.uint8)
        chosen = [members[label][(first + number // 10) % len(members[label])] for number, label in enumerate(labels)]
        images = np.kron(digits.images[chosen], np.ones((1, 3, 3))) * 255 / 16  # (n, 24, 24)
        images = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())


def write_images(
    folder: Path, wnids: Sequence[str], per_class: int, prefix: str = "ILSVRC_", suffix: str = ".JPEG"
) -> None:
    """Write folder/<wnid>/<prefix><number><suffix>, each kind in turn."""
    write_files(folder, [f"{wnid}/{prefix}{number}{suffix}" for wnid in wnids for number in range(per_class)])


def write_files(folder: Path, names: Sequence[str]) -> None:
    """Write small noise images, each kind in turn."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(names):
        path, kind = folder / name, KINDS[number % len(KINDS)]
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
        exif = Image.Exif()
        if kind == "exif":
            exif[274] = 6  # rotated by 90 degrees
        mode = {"grey": "L", "cmyk": "CMYK"}.get(kind, "RGB")
        image.convert(mode).save(path, "PNG" if kind == "png" else "JPEG", exif=exif)


def write_videos(csv: Path, folder: Path, labels: Sequence[str]) -> None:
    """An annotation file in Kinetics' format, and a video of three seconds per line; one label has underscores."""
    lines = ["label,youtube_id,time_start,time_end,split"]
    for number, label in enumerate((*labels, "abseiling")):  # the last is not one of the ten, and its video is missing
        written = label.replace(" ", "_") if label == "driving car" else label
        name = f"{'-_'[number % 2]}{label[:4].strip()}{number:02d}"
        lines.append(f'"{written}",{name},{number},{number + 10},{csv.stem}')
        if label in labels:
            write_video(folder / written / f"{name}_{number:06d}_{number + 10:06d}.mp4", frames=75, fps=25)
    csv.parent.mkdir(parents=True, exist_ok=True)
    csv.write_text("\n".join(lines) + "\n")


def write_video(path: Path, frames: int = 100, fps: int = 30) -> None:
    """64 x 48 pixels; frame number n is grey of 2n."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            array = np.full((48, 64, 3), 2 * number % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())
