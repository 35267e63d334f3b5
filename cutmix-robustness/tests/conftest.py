"""Small files in the formats of the real data sets."""

import numpy as np
import pytest
from PIL import Image


def picture(seed=0, height=40, width=48):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _save_picture(path, seed=0, height=40, width=48):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, height, width).save(path)


def _write_image_folder(root, classes, per_class=2):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            picture(10 * number + i).save(root / name / f"ILSVRC_{number}_{i}.JPEG")


@pytest.fixture
def write_image_folder():
    return _write_image_folder


@pytest.fixture
def save_picture():
    return _save_picture
