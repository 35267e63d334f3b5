"""Small files in the formats of the real data sets."""

import io
import os
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image


def picture(seed=0, height=40, width=48):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _write_cifar(root, name, n_train=40, n_test=20):
    """The pickled batches of CIFAR-100, or of CIFAR-10, that torchvision reads (without its hash check)."""
    classes = 100 if name == "cifar100" else 10
    folder = root / ("cifar-100-python" if name == "cifar100" else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(file, n):
        labels = [i % classes for i in range(n)]
        content = {"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8), "labels": labels, "fine_labels": labels}
        (folder / file).write_bytes(pickle.dumps(content))

    if name == "cifar100":
        write("train", n_train)
        write("test", n_test)
        (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(classes)]}))
    else:
        for number in range(1, 6):
            write(f"data_batch_{number}", n_train // 5)
        write("test_batch", n_test)
        (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(i) for i in range(classes)]}))


def _save_picture(path, seed=0, height=40, width=48):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, height, width).save(path)


def _write_jpeg_archive(path, per_class=4, classes=("airplane", "bird"), side=32):
    with zipfile.ZipFile(path, "w") as archive:
        for part in ("train", "test"):
            for number, name in enumerate(classes):
                for i in range(per_class):
                    buffer = io.BytesIO()
                    picture(100 * number + i, side, side).save(buffer, "JPEG")
                    archive.writestr(f"{part}/{name}/{i:04d}.jpg", buffer.getvalue())


def _write_image_folder(root, classes, per_class=2):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            picture(10 * number + i).save(root / name / f"ILSVRC_{number}_{i}.JPEG")


@pytest.fixture
def write_cifar(monkeypatch):
    """Writes what torchvision would check by hash; only the existence of the files is checked here."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.isfile(path))
    return _write_cifar


@pytest.fixture
def write_jpeg_archive():
    return _write_jpeg_archive


@pytest.fixture
def write_image_folder():
    return _write_image_folder


@pytest.fixture
def save_picture():
    return _save_picture
