"""Small federations, and small files in the formats of the real data sets."""

import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fl_linkability.data.styled import make_digits_users
from fl_linkability.store import UpdateStore

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts Ray; about a minute")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FL_LINKABILITY_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def bundle():
    """Four users, eight devices of 12 images."""
    return make_digits_users(0, n_users=4, n_per_device=12, background_size=120)


@pytest.fixture
def store_of():
    """Makes a store of updates given as (round, device, user, role)."""

    def make(rows):
        store = UpdateStore({"fc": (0, 2)})
        for k, (number, device, user, role) in enumerate(rows, 1):
            delta = np.full((1, 2), float(k))
            store.append(delta, round=number, device=device, user=user, role=role, n_examples=1)
        return store

    return make


@pytest.fixture
def write_mnist():
    def write(root, n_train=300, n_test=60):
        raw = root / "MNIST" / "raw"
        raw.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for part, n in (("train", n_train), ("t10k", n_test)):
            images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
            (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
            labels = (np.arange(n) % 10).astype(np.uint8)
            (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())

    return write


@pytest.fixture
def write_photos():
    """A table of images as a user makes it: three users of two devices, two labels."""

    def write(folder, per_device=6, size=(40, 32)):
        rng = np.random.default_rng(0)
        folder.mkdir(parents=True)
        lines = ["image_path,user_id,device_id,labels,role"]
        for user in "abc":
            for device in ("phone", "tablet"):
                for number in range(per_device):
                    name = f"{user}-{device}-{number}.jpg"
                    Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
                    role = "prior" if device == "phone" else "anonymous"
                    lines.append(f"{name},{user},{device},{'cat|dog' if number % 2 else 'cat'},{role}")
        (folder / "users.csv").write_text("\n".join(lines))
        lines = ["image_path,labels"]
        for number in range(8):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"bg{number}.jpg")
            lines.append(f"bg{number}.jpg,dog")
        (folder / "background.csv").write_text("\n".join(lines))

    return write


@pytest.fixture
def write_flair():
    """FLAIR's layout: labels_and_metadata.json and small_images."""

    def write(folder, per_user=10):
        (folder / "small_images").mkdir(parents=True)
        rng, entries = np.random.default_rng(0), []
        for user, partition in (("u1", "train"), ("u2", "train"), ("u3", "train"), ("v", "val")):
            for number in range(per_user):
                name = f"{user}{number:03d}"
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(folder / "small_images" / f"{name}.jpg")
                labels = ["plant"] if number % 2 else ["plant", "animal"]
                entries.append({"user_id": user, "image_id": name, "labels": labels, "partition": partition})
        (folder / "labels_and_metadata.json").write_text(json.dumps(entries))

    return write


@pytest.fixture
def write_femnist():
    """LEAF's JSON: users, num_samples, user_data."""

    def write(folder, writers=5, per_writer=20):
        path = folder / "data" / "train"
        path.mkdir(parents=True)
        rng = np.random.default_rng(0)
        data = {
            f"f{w:04d}": {"x": rng.random((per_writer - w // 4, 784)).tolist(), "y": [w] * (per_writer - w // 4)}
            for w in range(writers)
        }
        content = {"users": list(data), "num_samples": [len(d["y"]) for d in data.values()], "user_data": data}
        (path / "all_data_0.json").write_text(json.dumps(content))

    return write
