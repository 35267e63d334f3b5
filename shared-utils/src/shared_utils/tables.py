"""A table or figure of a paper as a TOML file: published figures, our settings per scale, and claims to judge."""

import difflib
import hashlib
import json
import math
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

TABLE_KEYS = {"title": str, "source": str, "metrics": dict, "scale": dict, "row": list}
TABLE_KEYS |= {"unit": str, "note": str, "claim": list}
SCALE_KEYS = {"seeds": list, "expected_seconds": Real}
ROW_KEYS = {"name": str, "published": dict, "published_source": str, "run": dict, "scales": list}
CLAIM_FORMS = (
    {"better": str, "than": str, "margin": Real},
    {"row": str, "minus": str, "at_least": Real, "at_most": Real},
    {"rows": list, "trend": str},
)
CLAIM_KEYS = {"text": str, "metric": str, "scales": list} | CLAIM_FORMS[0] | CLAIM_FORMS[1] | CLAIM_FORMS[2]


@dataclass(frozen=True)
class Scale:
    """Settings that every row shares at a scale, the seeds to run, and the expected seconds of one run."""

    name: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    expected_seconds: float | None = None


@dataclass(frozen=True)
class Row:
    """One row: the paper's figures, how we run it, and at which scales (None: at all)."""

    name: str
    published: dict[str, float] = field(default_factory=dict)
    published_source: str | None = None
    run: dict[str, Any] = field(default_factory=dict)
    scales: tuple[str, ...] | None = None
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A statement on one metric in one of three forms, judged at `scales` (None: wherever its rows exist).

    better, than, margin: `better` is better than `than` by more than `margin`, in the metric's direction.
    row, minus, at_least, at_most: the value of `row`, less that of `minus`, lies within the bounds.
    rows, trend: along `rows` the value "rises" or "falls", by Spearman's rank correlation.
    """

    text: str
    metric: str
    better: str | None = None
    than: str | None = None
    margin: float = 0.0
    row: str | None = None
    minus: str | None = None
    at_least: float | None = None
    at_most: float | None = None
    rows: tuple[str, ...] = ()
    trend: str | None = None
    scales: tuple[str, ...] | None = None

    @property
    def row_names(self) -> tuple[str, ...]:
        """Every row that the claim speaks of."""
        return tuple(name for name in (self.better, self.than, self.row, self.minus, *self.rows) if name)


@dataclass(frozen=True)
class Run:
    """One row at one scale with one seed; `metrics` are the names that its outcome must have."""

    table: str
    row: str
    scale: str
    seed: int
    settings: dict[str, Any]
    metrics: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What makes two runs the same."""
        return self.table, self.row, self.scale, self.seed, settings_hash(self.settings)


@dataclass(frozen=True)
class Table:
    """A table file; `id` is its stem, such as "table-5", and `metrics` maps a name to higher, lower or neutral."""

    id: str
    path: Path
    title: str
    source: str
    unit: str
    note: str
    metrics: dict[str, str]
    scales: dict[str, Scale]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()

    def has_scale(self, name: str) -> bool:
        """Whether the table declares this scale."""
        return name in self.scales

    def row(self, name: str) -> Row:
        """The row of that name; ValueError with the nearest one where there is none."""
        _known(self.id, "row", [name], [row.name for row in self.rows])
        return next(row for row in self.rows if row.name == name)

    def rows_at(self, scale: str) -> list[Row]:
        """Rows that exist at a scale."""
        return [row for row in self.rows if row.scales is None or scale in row.scales]

    def claims_at(self, scale: str) -> list[Claim]:
        """Claims that are to be judged at a scale: not limited to others, and on rows that exist there."""
        names = {row.name for row in self.rows_at(scale)}
        judged = [claim for claim in self.claims if claim.scales is None or scale in claim.scales]
        return [claim for claim in judged if names.issuperset(claim.row_names)]

    def settings(self, row: Row | str, scale: str) -> dict[str, Any]:
        """Resolved settings: the scale's, then the row's, then the row's at that scale."""
        row = self.row(row) if isinstance(row, str) else row
        return self.scales[scale].settings | row.run | row.overrides.get(scale, {})

    def runs(self, scale: str, rows: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> list[Run]:
        """Runs of a scale, row by row; none or empty `rows` or `seeds` mean all of the table's.

        ValueError for a scale that the table lacks or a row that does not exist at the scale.
        """
        _known(self.id, "scale", [scale], self.scales)
        _known(self.id, f"row at scale {scale}", rows or (), [row.name for row in self.rows_at(scale)])
        return [
            Run(self.id, row.name, scale, seed, self.settings(row, scale), tuple(self.metrics))
            for row in self.rows_at(scale)
            if not rows or row.name in rows
            for seed in dict.fromkeys(seeds or self.scales[scale].seeds)
        ]


def settings_hash(settings: dict[str, Any]) -> str:
    """12 hex digits of the settings' canonical JSON; the order of keys plays no part."""
    text = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def load_tables(folder: Path | str, setting_names: Iterable[str] | None = None) -> list[Table]:
    """All table files of a folder in natural order: figure-2 before figure-10. FileNotFoundError without the folder."""
    names = None if setting_names is None else list(setting_names)

    def natural(path: Path) -> list[str | int]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]

    paths = [path for path in Path(folder).iterdir() if path.suffix == ".toml"]
    return [load_table(path, names) for path in sorted(paths, key=natural)]


def load_table(path: Path | str, setting_names: Iterable[str] | None = None) -> Table:
    """Read and check a table file; settings are checked against `setting_names` where given.

    ValueError for a key, row, scale, metric or setting that is unknown, missing or of a wrong type; it names the file,
    the key and the nearest valid one.
    """
    path = Path(path)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    _check(path, "key", raw, TABLE_KEYS, ("title", "source", "metrics", "scale", "row"))
    _known(path, "direction of a metric", raw["metrics"].values(), ("higher", "lower", "neutral"))
    _check(path, "scale", raw["scale"], dict.fromkeys(raw["scale"], dict))
    names = None if setting_names is None else list(setting_names)
    scales = {name: _scale(path, name, body, names) for name, body in raw["scale"].items()}
    rows = tuple(_row(path, body, scales, raw["metrics"], names) for body in raw["row"])
    if len({row.name for row in rows}) < len(rows):
        raise ValueError(f"{path}: two rows have the same name")
    head = path.stem, path, raw["title"], raw["source"], raw.get("unit", "%"), raw.get("note", "")
    table = Table(*head, raw["metrics"], scales, rows)
    return replace(table, claims=tuple(_claim(table, body) for body in raw.get("claim", ())))


def _scale(path: Path, name: str, body: dict, names: list[str] | None) -> Scale:
    settings = {key: value for key, value in body.items() if key not in SCALE_KEYS}
    if names is not None:
        _known(path, "setting", settings, [*names, *SCALE_KEYS])
    reserved = {key: value for key, value in body.items() if key in SCALE_KEYS}
    _check(path, f"key of scale {name}", reserved, SCALE_KEYS, ("seeds",))
    seeds = body["seeds"]
    if not seeds or any(type(seed) is not int for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: seeds of scale {name} must be different integers, at least one, got {seeds}")
    return Scale(name, settings, tuple(seeds), body.get("expected_seconds"))


def _row(path: Path, body: dict, scales: dict, metrics: dict, names: list[str] | None) -> Row:
    _check(path, "key of a row", body, dict.fromkeys(scales, dict) | ROW_KEYS, ("name",))
    _check(path, f"metric of row {body['name']!r}", body.get("published", {}), dict.fromkeys(metrics, Real))
    _known(path, "scale", body.get("scales", ()), scales)
    overrides = {name: body.pop(name) for name in scales if name in body}
    for settings in (body.get("run", {}), *overrides.values()):
        _known(path, "setting", settings, settings if names is None else names)
    return Row(**body | {"scales": tuple(body["scales"]) if "scales" in body else None, "overrides": overrides})


def _claim(table: Table, body: dict) -> Claim:
    _check(table.path, "key of a claim", body, CLAIM_KEYS, ("text", "metric"))
    claim = Claim(**{key: tuple(value) if isinstance(value, list) else value for key, value in body.items()})
    _known(table.path, "metric", [claim.metric], table.metrics)
    _known(table.path, "scale", claim.scales or (), table.scales)
    _known(table.path, "row", claim.row_names, [row.name for row in table.rows])
    for scale in claim.scales or ():
        _known(table.path, f"row at scale {scale}", claim.row_names, [row.name for row in table.rows_at(scale)])
    given = body.keys() - {"text", "metric", "scales"}
    complete = (
        {"better", "than"} <= given and table.metrics[claim.metric] != "neutral",
        "row" in given and bool(given & {"at_least", "at_most"}),
        len(claim.rows) >= 3 and claim.trend in ("rises", "falls"),
    )
    if not any(done and given <= keys.keys() for done, keys in zip(complete, CLAIM_FORMS, strict=True)):
        raise ValueError(
            f"{table.path}: claim {claim.text!r} needs better and than (on a metric that is not neutral), or row with "
            "at_least or at_most, or three rows or more with a trend that rises or falls"
        )
    return claim


def _check(path: Path, what: str, body: dict, kinds: dict[str, type], required: Sequence[str] = ()) -> None:
    _known(path, what, body, kinds)
    for key in required:
        if key not in body:
            raise ValueError(f"{path}: missing {what} {key!r}")
    for key, value in body.items():
        number = kinds[key] is Real
        if not isinstance(value, kinds[key]) or (number and (isinstance(value, bool) or not math.isfinite(value))):
            raise ValueError(f"{path}: {what} {key!r} must be a {kinds[key].__name__.lower()}, got {value!r}")


def _known(where: Path | str, what: str, given: Iterable[Any], valid: Iterable[str]) -> None:
    valid = list(valid)
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, 1, 0.0)
            raise ValueError(f"{where}: unknown {what} {name!r}" + (f"; nearest is {near[0]!r}" if near else ""))
