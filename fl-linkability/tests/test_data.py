"""Made users have disjoint images and the bias they should have; real data sets from small files of their formats."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fl_linkability.data.bundle import Background, UserDataset
from fl_linkability.data.femnist import prepare, write_leaf
from fl_linkability.data.inventory import inventory
from fl_linkability.data.lists import Item, choose_users, read_flair, read_table, split_devices
from fl_linkability.data.photos import near_duplicates
from fl_linkability.data.reading import Reading
from fl_linkability.data.styled import UserSettings, make_digits_users, make_mnist_users
from fl_linkability.engines import simulate
from fl_linkability.experiments import Experiment, _bundle
from fl_linkability.settings import PRESETS
from fl_linkability.train import make_fabric

FABRIC = make_fabric("cpu")


def images_of(x):
    return {image.numpy().tobytes() for image in x}


def test_devices_background_and_tests_share_no_base_image():
    plain = make_digits_users(0, n_users=6, style=False)
    users = plain.users
    role = users.device_role[users.device.numpy()]
    parts = [users.x[role == 0], users.x[role == 1], plain.background.x, plain.test[0]]
    sets = [images_of(part) for part in parts]
    for a in range(4):
        for b in range(a):
            shared = sets[a] & sets[b]
            assert len(shared) <= 2, "scikit-learn's digits hold a few doubles"
    assert images_of(plain.user_test[0]) <= images_of(plain.test[0])


def test_users_differ_in_classes_and_looks_and_their_devices_do_not():
    users = make_digits_users(1, n_users=12, n_per_device=64).users
    counts = np.stack([np.bincount(users.of_device(d)[1], minlength=10) for d in range(24)]) / 64
    looks = np.stack([users.of_device(d)[0].flatten(1).mean(0) for d in range(24)])
    for values in (counts, looks):
        own = np.linalg.norm(values[0::2] - values[1::2], axis=1).mean()
        other = np.linalg.norm(values[0::2] - np.roll(values[1::2], 1, axis=0), axis=1).mean()
        assert own < 0.6 * other
    even = make_digits_users(1, n_users=12, skew=False, style=False).users
    counts = np.stack([np.bincount(even.of_device(d)[1], minlength=10) for d in range(24)]) / 64
    assert counts.max() < 0.3


def test_drift_moves_the_anonymous_half_only():
    still, drifted = (make_digits_users(2, n_users=8, drift=d).users for d in (0.0, 1.0))
    assert torch.equal(still.of_device(0)[0], drifted.of_device(0)[0])
    counts = [np.bincount(u.of_device(d)[1], minlength=10) for u in (still, drifted) for d in (0, 1)]
    assert np.abs(counts[0] - counts[1]).sum() < np.abs(counts[2] - counts[3]).sum()


def test_iid_replacement_takes_the_bias_away():
    users = make_digits_users(1, n_users=12, iid=True).users
    counts = np.stack([np.bincount(users.of_device(d)[1], minlength=10) for d in range(24)]) / 64
    assert counts.std(0).max() < 0.08


def test_sizes_seeds_and_the_record():
    a, b = (make_digits_users(seed, n_users=3, n_per_device=8, n_prior=2, background_size=100) for seed in (0, 0))
    assert a.record() == b.record() != make_digits_users(1, n_users=3, n_per_device=8, n_prior=2).record()
    assert [len(a.users.rows(d)) for d in range(6)] == [2, 8] * 3
    assert np.bincount(a.background.y).tolist() == [10] * 10 and len(a.user_test[0]) == 48 and len(a.test[0]) == 600
    assert a.users.device_role.tolist() == [0, 1] * 3 and a.users.device_user.tolist() == [0, 0, 1, 1, 2, 2]


def test_mnist_users(tmp_path, write_mnist):
    with pytest.raises(FileNotFoundError, match="lacks MNIST/raw: fl-linkability data --download"):
        make_mnist_users(tmp_path)
    write_mnist(tmp_path)
    made = make_mnist_users(tmp_path, n_users=3, n_per_device=10)
    assert made.users.x.shape == (60, 1, 28, 28) and made.name == "mnist" and len(made.background.x) == 400


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.rand(3, 2)}, "the same length, got 3 and 4"),
        ({"user": torch.tensor([0, 0, 1])}, "x, user, device and role must have the same length"),
        ({"device": torch.tensor([0, 0, 1, 3])}, "device 2 has no images"),
        ({"device": torch.tensor([0, 0, 0, 1])}, "device 0 has images of two users"),
        ({"user": torch.tensor([0, 0, 2, 2])}, "user 1 has no images: number the users 0 .. n_users - 1"),
        ({"role": torch.tensor([0, 1, 1, 1])}, "device 0 has images of two roles"),
        ({"role": torch.tensor([0, 0, 2, 2])}, "role must be 0 .prior. or 1 .anonymous."),
        ({"x": torch.full((4, 2), float("nan"))}, "x holds NaN or infinity"),
        ({"x": torch.ones(4, 2), "user": torch.zeros(4).long()}, "devices 0 and 1 of user 0 share an image"),
    ],
)
def test_wrong_users_are_refused(change, message):
    good = {
        "x": torch.arange(8.0).view(4, 2), "y": torch.zeros(4).long(), "user": torch.tensor([0, 0, 1, 1]),
        "device": torch.tensor([0, 0, 1, 1]),
    }  # fmt: skip
    UserDataset(**good)
    with pytest.raises(ValueError, match=message):
        UserDataset(**good | change)


def test_roles_of_devices():
    x, y = torch.arange(10.0).view(10, 1), torch.zeros(10).long()
    user, device = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 0, 0]), torch.arange(5).repeat_interleave(2)
    assert UserDataset(x, y, user, device).device_role.tolist() == [0, 1, 1, 0, 1]  # a third device is anonymous, too
    told = UserDataset(x, y, user, device, torch.tensor([1, 1, 0, 0, 0, 0, 1, 1, 0, 0]))
    assert told.device_role.tolist() == [1, 0, 0, 1, 0]


def test_wrong_types_and_settings_of_users():
    with pytest.raises(TypeError, match="x must be float32, uint8 or int64 .tokens., got torch.int32"):
        Background(torch.zeros(2, 3).int(), torch.zeros(2).long())
    with pytest.raises(TypeError, match="y must be int64 classes or words, or float32"):
        Background(torch.zeros(2, 3), torch.zeros(2).int())
    with pytest.raises(TypeError, match="x must be float32, uint8 or int64 .tokens., got torch.float64"):
        Background(torch.zeros(2, 3).double(), torch.zeros(2).long())
    with pytest.raises(TypeError, match="x and y must be tensors, got ndarray and Tensor"):
        Background(torch.zeros(2, 3).numpy(), torch.zeros(2).long())
    for change, message in (
        ({"n_users": 1}, "need 2 or more users"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"drift": 2.0}, "drift must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            UserSettings(**change)


# ---- tables of images, FLAIR, FEMNIST --------------------------------------------------------------------------


def photos(preset="photos-full", **changes):
    small = {"side": 32, "rounds": 1, "clients_per_round": 4, "clients_at_once": 3, "pretrained": False}
    return replace(PRESETS[preset], **small | {"clusters": 2, "measure": "utility"} | changes)


@pytest.mark.parametrize("shard", ["given", "random", "chrono"])
def test_a_table_of_photos(tmp_path, write_photos, shard):
    write_photos(tmp_path / "csv")
    run = Experiment(photos("photos-head", shard=shard), 0, Reading(tmp_path), FABRIC)
    bundle = run.bundle
    assert bundle.n_classes == 2 and bundle.users.n_users == 3 and bundle.users.n_devices == 6
    assert len(bundle.users.x) + len(bundle.user_test[0]) == 36 and bundle.users.x.shape[1] == 1280
    assert bundle.background.y.tolist() == [[0, 1]] * 8
    outcome = run.measure(run.settings)
    assert 0 <= outcome.metrics["user_accuracy"] <= 100 and outcome.dataset["users"] == 3
    _bundle.cache_clear()
    again = Experiment(photos("photos-head", shard=shard), 0, Reading(tmp_path), FABRIC).bundle  # from the cache
    assert torch.equal(again.users.x[:], bundle.users.x[:])
    (tmp_path / "csv" / "background.csv").unlink()
    alone = Experiment(photos("photos-head", shard=shard, mitigation="rand-aug"), 1, Reading(tmp_path), FABRIC)
    assert len(alone.bundle.background.x) == 0
    with pytest.raises(ValueError, match="the background is empty"):
        alone.mitigation  # noqa: B018


@pytest.mark.parametrize("bn, engine", [("frozen", "batched"), ("local", "loop"), ("sent", "loop")])
def test_mobilenet_federation(tmp_path, write_photos, bn, engine):
    write_photos(tmp_path / "csv", per_device=3)
    settings = photos(
        bn=bn, engine=engine, keep="fc|features.18.1", mitigation="mm-aug", ratio=0.5, batch_size=2, side=64
    )
    run = Experiment(settings, 0, Reading(tmp_path), FABRIC)
    found = run.simulation
    assert found.faults == [] and len(found.updates) == 4 and np.abs(found.updates.delta).max() > 0
    layers = set(found.updates.layer_slices)
    assert {"fc.weight", "fc.bias"} < layers
    assert any("running" in name for name in layers) == (bn == "sent")
    if bn == "frozen":  # the stacked clients are the loop's
        loop = simulate(
            run.bundle, run.model, replace_rounds(run), run.mitigation, "loop", keep="fc|features.18.1"
        ).updates
        np.testing.assert_allclose(found.updates.delta, loop.delta, rtol=0, atol=1e-4)
    else:
        with pytest.raises(ValueError, match='batch norm in training mode .* needs engine "loop"'):
            simulate(run.bundle, run.model, replace_rounds(run))


def replace_rounds(run):
    from fl_linkability.federation import FedAvgConfig

    return FedAvgConfig(1, 4, run.local(1), run.seed)


def test_flair(tmp_path, write_flair):
    with pytest.raises(FileNotFoundError, match="FLAIR is missing"):
        Experiment(photos("flair", users=3), 0, Reading(tmp_path), FABRIC).bundle  # noqa: B018
    write_flair(tmp_path / "flair")
    settings = photos("flair", users=3, images_per_device=2, model="mobilenet-head", clients_at_once=0)
    bundle = Experiment(settings, 0, Reading(tmp_path), FABRIC).bundle
    assert bundle.users.n_users == 3 and len(bundle.background.x) == 10 and bundle.n_classes == 2
    with pytest.raises(ValueError, match="0 users have 125 images or more, 3 are needed"):
        Experiment(replace(settings, images_per_device=50), 0, Reading(tmp_path), FABRIC).bundle  # noqa: B018


def test_femnist(tmp_path, write_femnist):
    settings = replace(PRESETS["femnist"], users=3, images_per_device=2, rounds=2, clients_per_round=3)
    with pytest.raises(FileNotFoundError, match="no JSON file from LEAF"):
        Experiment(settings, 0, Reading(tmp_path), FABRIC).bundle  # noqa: B018
    write_femnist(tmp_path / "femnist")
    run = Experiment(settings, 0, Reading(tmp_path), FABRIC)
    assert run.bundle.users.x.shape == (48, 1, 28, 28) and len(run.bundle.user_test[0]) == 12
    content = json.loads((tmp_path / "femnist/data/train/all_data_0.json").read_text())["user_data"]
    white = 1 - np.array(content["f0000"]["x"], np.float32)
    assert images_of(run.bundle.users.of_device(0)[0]) <= {image.tobytes() for image in white}
    assert len(run.simulation.updates) == 6


def test_a_writer_in_two_files_of_leaf_keeps_all_images(tmp_path):
    rng = np.random.default_rng(0)
    draw = lambda n: (rng.random((n, 784)), rng.integers(0, 62, n))  # noqa: E731
    folder = tmp_path / "femnist/data/train"
    write_leaf(folder / "a.json", {"f1": draw(5), "f2": draw(3)})
    write_leaf(folder / "b.json", {"f1": draw(7)})
    (folder / "._a.json").write_bytes(b"\x00 left by a file system")
    x, y, writer = prepare(folder, tmp_path / "cache")
    assert x.shape == (15, 1, 28, 28) and len(y) == 15 and (writer == "f1").sum() == 12
    again, *_ = prepare(folder, tmp_path / "cache")
    assert torch.equal(x, again)
    for broken in (
        '{"user_data": {"f1": {"x": [[1, 2]], "y": [1]}}}',
        '{"user_data": {"f1": {"y": [1]}}}',
        '{"user_data',
    ):
        (folder / "b.json").write_text(broken)
        with pytest.raises(ValueError, match="b.json: not a file of LEAF's FEMNIST"):
            prepare(folder, tmp_path / "cache")


MANY = """
import resource, sys
from dataclasses import replace
from pathlib import Path
import fl_linkability.data.femnist as femnist
from fl_linkability.data.reading import Reading
from fl_linkability.settings import PRESETS
settings = replace(PRESETS["femnist"], users=50, images_per_device=2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bundle = femnist.load_femnist(settings, 0, Reading(Path(sys.argv[1])))
assert bundle.users.n_users == 50 and len(bundle.background.x) > 3000 * 6
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_3500_writers_load_in_bounded_memory(tmp_path):
    """All in one file, as LEAF writes a small sample; Python lists of these pixels would take 600 MB."""
    line = ("[" + ", ".join(["0.9961"] * 784) + "]").encode()
    path = tmp_path / "femnist/data/train/all.json"
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.write(b'{"users": [], "num_samples": [], "user_data": {')
        for writer in range(3500):
            x = b", ".join([line] * 7)
            file.write(b", " * (writer > 0) + b'"f%04d": {"x": [%s], "y": [1, 2, 3, 4, 5, 6, 7]}' % (writer, x))
        file.write(b"}}")
    environment = os.environ | {"FL_LINKABILITY_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", MANY, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 250, "MB"


def test_devices_of_real_users():
    items = [Item(Path(f"{u}{i}"), u, ("x",), f"d{i % 2}", (i + 1) % 2) for u in "ab" for i in range(10)]
    split = split_devices(items, "chrono", 0)
    assert split.test.sum() == 4 and (split.user == np.repeat([0, 1], 10)).all()
    for who in range(2):
        first, second = (np.flatnonzero(~split.test & (split.user == who) & (split.role == role)) for role in (0, 1))
        assert len(first) == len(second) == 4 and first.max() < second.min(), "the prior half is the older one"
    given = split_devices(items, "given", 0)
    assert (given.role == np.tile([1, 0], 10)).all() and (given.device == given.user * 2 + given.role).all()
    third = [*items, *(Item(Path(f"t{i}"), "a", ("x",), "tablet", 1) for i in range(5))]
    given = split_devices(third, "given", 0)
    assert len(set(given.device)) == 5 and (given.role[-5:] == 1).all() and len(set(given.device[-5:])) == 1
    for broken in ({"role": -1}, {"role": 0}):
        with pytest.raises(ValueError, match="user a: shard 'given' needs a column role"):
            split_devices([replace(item, **broken) for item in items], "given", 0)
    assert {item.user for item in choose_users(items[:14], 0, 1)} == {"a", "b"}
    with pytest.raises(ValueError, match="1 users have 8 images or more, 2 are needed"):
        choose_users(items[:14], 2, 3)


def test_near_duplicates_across_devices_are_left_out():
    images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[4] = (images[0].int() + 1).clamp(0, 255).to(torch.uint8)
    role = np.array([0, 0, 0, 1, 1, 1])
    assert near_duplicates(images, np.zeros(6, int), role).tolist() == [False] * 4 + [True, False]
    assert not near_duplicates(images, np.array([0, 1, 1, 1, 1, 1]), role).any()  # another user's do not count


GOOD = ["ann/1.jpg,ann,old,cat|dog,prior", "ann/2.jpg,ann,new,dog,anonymous", "björn/1.jpg,björn,old,cat,prior"]
HEADER = "image_path,user_id,device_id,labels,role"


def test_tables_as_people_write_them(tmp_path):
    path = tmp_path / "users.csv"

    def read(header=HEADER, lines=GOOD, encoding="utf-8"):
        path.write_bytes("\n".join([header, *lines]).encode(encoding))
        return read_table(path)

    plain = read()
    assert plain[0] == Item(tmp_path / "ann/1.jpg", "ann", ("cat", "dog"), "old", 0) and plain[2].user == "björn"
    assert read(encoding="utf-8-sig") == plain
    assert read(header=HEADER.replace(",", " , ")) == plain
    assert read(lines=[line.replace("|", " | ").replace(",", ", ") for line in GOOD]) == plain
    assert read(lines=[*GOOD, "", " , ,,,"]) == plain
    assert [item.role for item in read("image_path,user_id,device_id,labels", [x.rsplit(",", 1)[0] for x in GOOD])] == [
        -1
    ] * 3
    for change, message in (
        ({"encoding": "latin-1"}, "users.csv: not UTF-8 .byte .*; save it as UTF-8"),
        ({"header": HEADER.replace(",", ";")}, "no column image_path, user_id, device_id, labels between commas"),
        ({"header": "image_path,user_id,device_id"}, "no column labels"),
        ({"lines": []}, "no lines below the header"),
        ({"lines": [",ann,old,cat,prior"]}, "line 2: image_path is empty"),
        ({"lines": [*GOOD, "ann/3.jpg,ann,old, | ,prior"]}, "line 5: labels is empty"),
        ({"lines": ["ann/3.jpg,ann"]}, "line 2: device_id is empty"),
        (
            {"lines": [*GOOD, "ann/1.jpg,ann,new,cat,anonymous"]},
            "line 5: ann/1.jpg is already on device old of user ann",
        ),
        ({"lines": ["ann/3.jpg,ann,old,cat,shadow"]}, "role must be prior or anonymous, got 'shadow'"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            read(**change)
        assert "\n" not in str(refused.value)
    with pytest.raises(FileNotFoundError, match="no such table"):
        read_table(tmp_path / "none.csv")


def test_flair_is_in_the_order_of_flickr_s_numbers(tmp_path):
    numbers = ["14913474848", "987654321", "5000001", "4999999"]
    entries = [{"image_id": n, "user_id": "u@N00", "labels": [], "partition": "train"} for n in numbers]
    (tmp_path / "labels_and_metadata.json").write_text(json.dumps(entries))
    items, background = read_flair(tmp_path)
    assert [item.path.stem for item in items] == numbers[::-1] and background == []
    (tmp_path / "labels_and_metadata.json").write_text(json.dumps([{"image_id": "1"}]))
    with pytest.raises(ValueError, match="an entry has no 'user_id'"):
        read_flair(tmp_path)


def test_inventory(tmp_path, write_mnist):
    missing = {row[0] for row in inventory(tmp_path) if row[4] == "no"}
    assert len(missing) == 8 and "MNIST" in missing
    write_mnist(tmp_path)
    assert "MNIST" not in {row[0] for row in inventory(tmp_path) if row[4] == "no"}
