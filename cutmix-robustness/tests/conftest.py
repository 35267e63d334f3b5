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


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Checkpoints below the test's folder, images read without further processes."""
    from cutmix_robustness import detection, experiments
    from cutmix_robustness.data import sources

    monkeypatch.setattr(experiments, "PROJECT", tmp_path / "project")
    defaults = sources.ImageFiles.__init__.__defaults__
    monkeypatch.setattr(sources.ImageFiles.__init__, "__defaults__", (*defaults[:-2], 0, None))
    monkeypatch.setattr(detection, "_workers", lambda: 0)
