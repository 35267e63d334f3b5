"""Small files in the formats of the real data sets."""

import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image


def _write_mnist(root, n_train=40, n_test=20):
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, n in (("train", n_train), ("t10k", n_test)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        labels = (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())


def _write_images(folder, wnids, per_class=2, size=(40, 32)):
    rng = np.random.default_rng(0)
    for wnid in wnids:
        (folder / wnid).mkdir(parents=True)
        for number in range(per_class):
            image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
            image.save(folder / wnid / f"ILSVRC_{number}.JPEG")


def _write_video(path, frames=100, fps=30):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            array = np.full((48, 64, 3), 2 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode())


def _closed_form(network):
    """The weights that the fixtures of the released networks were made with; float64, in eval mode."""
    state = network.state_dict()
    for j, (name, value) in enumerate(state.items()):
        k = torch.arange(value.numel(), dtype=torch.float64)
        if value.ndim > 1:
            new = torch.sin(0.37 * k + j) / math.sqrt(value[0].numel())
        elif name.endswith("running_var"):
            new = 1 + 0.1 * torch.cos(0.3 * k)
        elif name.endswith("weight"):
            new = 1 + 0.1 * torch.cos(0.3 * k + j)
        elif value.ndim == 1:
            new = 0.1 * torch.cos(0.11 * k + j)
        else:
            continue
        state[name] = new.view(value.shape)
    network.double().load_state_dict(state)
    return network.eval()


@pytest.fixture
def closed_form():
    return _closed_form


@pytest.fixture
def write_mnist():
    return _write_mnist


@pytest.fixture
def write_images():
    return _write_images


@pytest.fixture
def write_video():
    return _write_video
