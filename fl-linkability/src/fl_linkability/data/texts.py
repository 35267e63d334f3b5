"""Texts of users as word numbers: the Blog Authorship Corpus and the Yelp Open Dataset, as they are released.

Blog: a sample is a sentence, the task is its next word. Yelp: a sample is a review, the task is its number of stars. A
user's samples are in the order of their dates.
"""

from __future__ import annotations

import html
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from fl_linkability.data.bundle import NOTHING, Background, FederatedBundle
from fl_linkability.data.lists import Item, most_active, on_devices, split_devices
from fl_linkability.data.reading import Reading
from fl_linkability.settings import Settings

T = TypeVar("T")
UNKNOWN = NOTHING + 1
STARS = 5
DIMENSIONS = 50
WORD = re.compile(r"\w+(?:['’]\w+)*")
POST = re.compile(r"<date>([^<]*)</date>\s*<post>(.*?)(?=</post>|<date>|\Z)", re.DOTALL)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")
MONTHS = {
    name: number
    for number, name in enumerate(
        "january february march april may june july august september october november december".split(), 1
    )
}


@dataclass(frozen=True)
class Text:
    """A sample: its user, its text and, for a review, its stars."""

    user: str
    text: str
    stars: float = 0.0


def load_texts(settings: Settings, seed: int, reading: Reading) -> FederatedBundle:
    """Bloggers or reviewers with enough posts or reviews, on two devices each.

    Raises:
        FileNotFoundError: the data set is missing.
        ValueError: too few users with enough texts, or a file in the wrong format.
    """
    s, folder = settings, reading.root / settings.dataset
    read, behind = (read_blogs, background_sentences) if s.dataset == "blog" else (read_yelp, background_reviews)
    texts = read(folder, s.users, max(s.images_per_device, 1))
    split = split_devices([Item(Path(), each.user, ()) for each in texts], s.shard, seed)
    train = np.flatnonzero(~split.test)
    number = vocabulary((texts[row].text for row in train), s.vocabulary)
    samples = next_words if s.dataset == "blog" else with_stars
    x, y = samples(texts, number, s.length)
    background = Background(*samples(islice(behind(folder), s.background or None), number, s.length))
    size = len(number) + UNKNOWN + 1
    return on_devices(
        s.dataset, lambda rows: (x[rows], y[rows]), split, ~split.test, split.test, background,
        size if s.dataset == "blog" else STARS, vocabulary=size,
    )  # fmt: skip


def words_of(text: str) -> list[str]:
    """Lower-case words, separated by all other characters, control characters included."""
    return WORD.findall(text.lower())


def vocabulary(texts: Iterable[str], size: int) -> dict[str, int]:
    """Numbers of the most frequent words (ties by spelling): `size` of them, padding and unknown words included."""
    count = Counter(word for text in texts for word in words_of(text))
    ranked = sorted(count, key=lambda word: (-count[word], word))[: size - UNKNOWN - 1]
    return {word: rank for rank, word in enumerate(ranked, UNKNOWN + 1)}


def tokens(texts: Iterable[str], number: dict[str, int], length: int) -> Tensor:
    """int64 (n, length): words without a number become UNKNOWN, NOTHING pads the end."""
    flat = array("q")
    for text in texts:
        row = [number.get(word, UNKNOWN) for word in words_of(text)[:length]]
        flat.extend(row + [NOTHING] * (length - len(row)))
    return torch.from_numpy(np.array(flat, np.int64).reshape(-1, length))


def next_words(texts: Iterable[Text], number: dict[str, int], length: int) -> tuple[Tensor, Tensor]:
    """Sentences and the next word at each position, int64 (n, length); unknown words are not predicted."""
    whole = tokens((each.text for each in texts), number, length + 1)
    y = whole[:, 1:].clone()
    y[y == UNKNOWN] = NOTHING
    return whole[:, :-1].clone(), y


def with_stars(texts: Iterable[Text], number: dict[str, int], length: int) -> tuple[Tensor, Tensor]:
    """Reviews int64 (n, length) and stars float32 (n,)."""
    stars = array("f")

    def words() -> Iterator[str]:
        for each in texts:
            stars.append(each.stars)
            yield each.text

    x = tokens(words(), number, length)
    return x, torch.from_numpy(np.array(stars, np.float32))


def word_vectors(x: np.ndarray, seed: int) -> np.ndarray:
    """Vectors of texts (n, length) for clustering, float64 (n, d): TF-IDF word counts, 50 dimensions by SVD.

    The paper does not say which features of texts it clusters.
    """
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer

    there = x != NOTHING
    rows = np.repeat(np.arange(len(x)), there.sum(1))
    counts = csr_matrix((np.ones(len(rows)), (rows, x[there])))
    return TruncatedSVD(min(DIMENSIONS, counts.shape[1]), random_state=seed).fit_transform(
        TfidfTransformer().fit_transform(counts)
    )


# ---- the Blog Authorship Corpus --------------------------------------------------------------------------------


def blog_files(folder: Path) -> list[Path]:
    """blogs/<id>.<gender>.<age>.<industry>.<sign>.xml, without hidden files. FileNotFoundError if there are none."""
    paths = sorted(path for path in (folder / "blogs").glob("*.xml") if not path.name.startswith("."))
    if not paths:
        raise FileNotFoundError(f"{folder / 'blogs'}: no blogs; see `fl-linkability data`")
    return paths


def read_blogs(folder: Path, n_users: int, per_device: int) -> list[Text]:
    """Sentences of at least two words by the bloggers with the most posts; posts are counted in the raw bytes."""
    paths = {path.name.split(".")[0]: path for path in blog_files(folder)}
    count = {user: path.read_bytes().count(b"<post>") for user, path in paths.items()}
    chosen = sorted(most_active(count, n_users, per_device, "posts"))
    return [Text(user, each) for user in chosen for post in read_blog(paths[user]) for each in sentences(post)]


def read_blog(path: Path) -> list[str]:
    """Posts of one blogger by date; a post without a readable date takes the date of the post before it.

    The files are not XML: they have bare & and <, undeclared entities, control characters, and often Latin-1 bytes.
    """
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("cp1252", errors="replace")
    when, posts = date.min, []
    for stamp, post in POST.findall(text):
        when = _date(stamp) or when
        posts.append((when, html.unescape(post)))
    return [post for _, post in sorted(posts, key=lambda each: each[0])]


def _date(stamp: str) -> date | None:
    """The date in "31,May,2004"; None if it is empty or in another language."""
    try:
        day, month, year = stamp.split(",")
        return date(int(year), MONTHS[month.strip().lower()], int(day))
    except (KeyError, ValueError):
        return None


def sentences(post: str) -> list[str]:
    """Sentences and lines of at least two words: a single word has no next one."""
    return [part.strip() for part in SENTENCE_END.split(post) if len(words_of(part)) > 1]


def background_sentences(folder: Path) -> Iterator[Text]:
    """Lines of background.txt, UTF-8; none if it is missing."""
    path = folder / "background.txt"
    if path.is_file():
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            yield from (Text("", line) for line in file if len(words_of(line)) > 1)


# ---- the Yelp Open Dataset -------------------------------------------------------------------------------------


def review_file(folder: Path) -> Path:
    """The file of Yelp's reviews. FileNotFoundError if it is missing."""
    path = folder / "yelp_academic_dataset_review.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: Yelp's reviews are missing; see `fl-linkability data`")
    return path


def read_yelp(folder: Path, n_users: int, per_device: int) -> list[Text]:
    """Reviews by the users with the most reviews, by date; the file is read twice to save memory."""
    path = review_file(folder)
    count = Counter(_lines(path, lambda entry: entry["user_id"]))
    chosen = most_active(count, n_users, per_device, "reviews")

    def review(entry: dict) -> tuple[str, str, float, str] | None:
        user = entry["user_id"]
        return (user, entry["date"], float(entry["stars"]), entry["text"]) if user in chosen else None

    found = sorted((each for each in _lines(path, review) if each), key=lambda each: each[:2])
    return [Text(user, text, stars) for user, _, stars, text in found]


def background_reviews(folder: Path) -> Iterator[Text]:
    """background.json: reviews in Amazon's layout, one JSON object per line; none if it is missing."""
    path = folder / "background.json"
    if path.is_file():
        for stars, text in _lines(path, lambda entry: (float(entry["overall"]), entry.get("reviewText", ""))):
            if text:
                yield Text("", text, stars)


def _lines(path: Path, take: Callable[[dict], T]) -> Iterator[T]:
    """`take` applied to the JSON object in each line. ValueError, naming the line, if that fails."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield take(json.loads(line))
                except (KeyError, TypeError, ValueError) as error:
                    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                    raise ValueError(f"{path} line {number}: not a review ({reason}); fetch the file again") from error


def count_samples(name: str, folder: Path) -> int:
    """Number of posts or reviews of a data set, read completely. Raises what the readers raise."""
    if name == "blog":
        return sum(len(read_blog(path)) for path in blog_files(folder))
    return sum(1 for _ in _lines(review_file(folder), lambda entry: (entry["user_id"], entry["date"], entry["text"])))
