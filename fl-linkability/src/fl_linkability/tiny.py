"""Small archives in the real layouts, with the quirks of real ones: what a data root must look like.

The rehearsal (`make rehearse`) uses them, and they show a user where files belong: `fl-linkability data --tiny FOLDER`.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from fl_linkability.data.femnist import PIXELS, write_leaf

USERS, PER_DEVICE, SIDE = 10, 6, 40
RARE = 'cat/dog, "both" & größer'
TALK = "today we walked home and saw the old dog near a café it's so warm but nobody came to my house again".split()


def write_tiny(root: Path) -> None:
    """Every data set in its layout below the folder; existing files are overwritten."""
    rng = np.random.default_rng(0)
    _mnist(root / "MNIST" / "raw", rng)
    _femnist(root / "femnist" / "data" / "train", rng)
    _flair(root / "flair", rng)
    _blogs(root / "blog", rng)
    _reviews(root / "yelp", rng)
    for name in ("pipa", "openimages", "csv"):
        _table(root / name, rng)


def _mnist(folder: Path, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, n in (("train", 600), ("t10k", 200)):
        images, labels = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, n, 28, 28) + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, n) + labels.tobytes())


def _femnist(folder: Path, rng: np.random.Generator) -> None:
    """LEAF's output: several files; a writer may be in two of them, and the number of images varies."""
    files: list[dict] = [{}, {}]
    for number in range(USERS + 3):
        n = 10 + number
        ink = rng.random((n, PIXELS)) * (0.3 + 0.05 * number)
        files[number % 2][f"f{number:04d}_{number % 50:02d}"] = (1 - ink, rng.integers(0, 62, n))
    files[1]["f0000_00"] = (rng.random((5, PIXELS)), rng.integers(0, 62, 5))
    for number, writers in enumerate(files):
        write_leaf(folder / f"all_data_{number}_niid_0_keep_0_train_9.json", writers)
    (folder / "._all_data_0_niid_0_keep_0_train_9.json").write_bytes(b"\x00\x05\x16\x07")  # a Mac's shadow file


def _flair(folder: Path, rng: np.random.Generator) -> None:
    """Flickr's photo numbers of nine to eleven digits, an image without a coarse label, users of other partitions."""
    images, entries = folder / "small_images", []
    images.mkdir(parents=True, exist_ok=True)
    (images / ".DS_Store").write_bytes(b"\x00")
    for user in range(USERS + 2):
        partition = "train" if user < USERS else ("val", "test")[user % 2]
        for number in range(2 * PER_DEVICE):
            image_id = str((5_000_000, 987_654_000, 14_913_474_000)[number % 3] + 100 * user + number)
            _photo(images / f"{image_id}.jpg", user, number, rng)
            labels = [] if number == 3 else ["structure", *(["plant"] if number % 2 else [])]
            entry = {"user_id": f"5976917{user}@N00", "image_id": image_id, "labels": labels, "partition": partition}
            entries.append(entry | {"fine_grained_labels": ["bag"]})
    (folder / "labels_and_metadata.json").write_text(json.dumps(entries))


def _said(user: int, rng: np.random.Generator) -> str:
    """A sentence; each user prefers some words."""
    liked = np.roll(0.8 ** np.arange(len(TALK)), 2 * user)
    return " ".join(rng.choice(TALK, 4 + rng.integers(8), p=liked / liked.sum())).capitalize() + "."


def _blogs(folder: Path, rng: np.random.Generator) -> None:
    """Not XML, several encodings: bare & and <, entities, control characters, dates in other languages or none."""
    (folder / "blogs").mkdir(parents=True, exist_ok=True)
    (folder / "blogs" / "._900.male.24.indUnk.Leo.xml").write_bytes(b"\x00\x05\x16\x07")
    for user in range(USERS + 1):
        posts = []
        for number in range(2 if user == USERS else 2 * PER_DEVICE):  # the last one has too few
            stamp = ("%02d,May,2004", "%02d,août,2004", ",,", "%02d,June,2003")[number % 4]
            text = " ".join(_said(user, rng) for _ in range(3))
            text += ("", " Q&A <3 urlLink", "&nbsp;\x0b&eacute;t&eacute; \x07", "\n\n\t ok")[number % 4]
            stamp = stamp % (28 - number) if "%" in stamp else stamp
            posts.append(f"<date>{stamp}</date>\n<post>\n\n\t {text}\n\n    \n</post>\n\n\n")
        content = f"<Blog>\n\n{''.join(posts)}\n</Blog>"
        path = folder / "blogs" / f"{900 + user}.{('male', 'female')[user % 2]}.24.indUnk.Leo.xml"
        path.write_bytes(content.encode(("utf-8", "latin-1")[user % 2]))
    (folder / "background.txt").write_text("".join(_said(number, rng) + "\n" for number in range(40)), encoding="utf-8")


def _reviews(folder: Path, rng: np.random.Generator) -> None:
    """One JSON object per line, users and dates mixed; and Amazon's reviews, one without text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(2 * PER_DEVICE * USERS + 3):  # the last user has too few
        user = number % USERS if number < 2 * PER_DEVICE * USERS else USERS
        stars = float(rng.integers(1, 6))
        date = f"20{10 + number % 8}-03-{1 + number % 28:02d} 20:12:14"
        lines.append({
            "review_id": f"r{number}", "user_id": f"user {user} ü", "business_id": "b", "stars": stars, "useful": 0,
            "funny": 0, "cool": 0, "text": f"{_said(user, rng)}\n\n{_said(user, rng)}", "date": date,
        })  # fmt: skip
    reviews = folder / "yelp_academic_dataset_review.json"
    reviews.write_text("".join(json.dumps(line) + "\n" for line in lines))
    behind = [{"overall": 1.0 + n % 5, "reviewText": _said(n, rng)} for n in range(40)] + [{"overall": 5.0}]
    (folder / "background.json").write_text("".join(json.dumps(line) + "\n" for line in behind))


def _table(folder: Path, rng: np.random.Generator) -> None:
    """A table as an office program saves it, with a byte-order mark and spaces; a third device, a rare odd label."""
    lines = ["image_path, user_id, device_id, labels, role"]
    for user in range(USERS):
        name = f"Jürgen {user}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        for device, role in (
            ("phone", "anonymous"),
            ("old phone", "prior"),
            *([("tablet", "anonymous")] * (user == 0)),
        ):
            for number in range(PER_DEVICE):
                path = f"{name}/{device} {number}.jpg"
                _photo(folder / path, user, number, rng)
                labels = "cat | dog" if number % 2 else "dog"
                if (user, number) == (0, 0):
                    labels = f"cat|{RARE}"
                lines.append(f'"{path}",{name},{device},"{labels.replace(chr(34), chr(34) * 2)}",{role}')
    (folder / "users.csv").write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    (folder / "background").mkdir(exist_ok=True)
    (folder / "background" / ".ipynb_checkpoints").mkdir(exist_ok=True)
    lines = ["image_path,labels"]
    for number in range(30):
        _photo(folder / "background" / f"{number}.jpg", number, number, rng)
        lines.append(f"background/{number}.jpg,{'cat' if number % 3 else 'dog'}")
    (folder / "background.csv").write_text("\n".join(lines) + "\n")


def _photo(path: Path, user: int, number: int, rng: np.random.Generator) -> None:
    """A JPEG in colour, grey, CMYK or turned by EXIF, or a 16-bit PNG named .jpg."""
    noise = rng.integers(0, 256, (SIDE, SIDE + 8, 3)) * (0.4 + 0.05 * user)
    image = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    kind = number % 5
    if kind == 1:
        image.convert("L").save(path)
    elif kind == 2:
        image.convert("CMYK").save(path)
    elif kind == 3:
        exif = image.getexif()
        exif[0x112] = 6  # a camera held upright
        image.save(path, exif=exif)
    elif kind == 4:
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(path, format="PNG")
    else:
        image.save(path)
