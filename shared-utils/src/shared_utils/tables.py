"""A table or figure of a paper as a TOML file: published figures, our settings per scale, and claims to judge."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DIRECTIONS = ("higher", "lower", "neutral")


@dataclass(frozen=True)
class Scale:
    """Settings that all rows share at a scale, and the seeds to run."""

    name: str
    seeds: tuple[int, ...]
    expected_seconds: float | None
    settings: dict[str, Any]
    measured_on: str = ""
    """data and network in words if they differ from the paper's; heading of our column"""


@dataclass(frozen=True)
class Row:
    """One row: the paper's figures and how we run it."""

    name: str
    published: dict[str, float] = field(default_factory=dict)
    published_error: dict[str, float] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    scales: tuple[str, ...] | None = None
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    home: Table | None = None
    """the table that runs and logs the row of this name, if it is not this one"""


@dataclass(frozen=True)
class Claim:
    """A statement about rows; see CONTRIBUTING for its three forms."""

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
    every_seed: bool = False
    exact: bool = False
    """a value that does not depend on the seed, such as a count: judged without an interval"""
    note: str = ""
    scales: tuple[str, ...] | None = None

    @property
    def named_rows(self) -> tuple[str, ...]:
        """All rows of the claim."""
        return tuple(name for name in (self.better, self.than, self.row, self.minus, *self.rows) if name)


@dataclass(frozen=True)
class Run:
    """One row at one scale with one seed."""

    table: str
    row: str
    scale: str
    seed: int
    settings: dict[str, Any]
    metrics: tuple[str, ...]

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        """What makes two records the same run."""
        return self.table, self.row, self.scale, self.seed, settings_hash(self.settings)


@dataclass(frozen=True)
class Table:
    """A table file; `id` is its stem, such as "table-5"."""

    id: str
    title: str
    source: str
    metrics: dict[str, str]
    scales: dict[str, Scale]
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    note: str = ""
    published_on: str = ""
    """data and network of the published figures; heading of their column"""

    def row(self, name: str) -> Row:
        """The row with this name. ValueError if there is none."""
        _known(self.id, "row", [name], [row.name for row in self.rows])
        return next(row for row in self.rows if row.name == name)

    def rows_at(self, scale: str) -> list[Row]:
        """Rows that exist at a scale."""
        return [row for row in self.rows if row.scales is None or scale in row.scales]

    def settings(self, row: Row, scale: str) -> dict[str, Any]:
        """Resolved settings: those of the scale, then of the row, then of the row at that scale."""
        if row.home:
            return row.home.settings(row.home.row(row.name), scale)
        return self.scales[scale].settings | row.run | row.overrides.get(scale, {})

    def runs(self, scale: str, rows: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> list[Run]:
        """All runs of a scale. ValueError for a scale, or a row at this scale, that the table does not have."""
        _known(self.id, "scale", [scale], self.scales)
        _known(self.id, "row", rows or (), [row.name for row in self.rows])
        if elsewhere := set(rows or ()) - {row.name for row in self.rows_at(scale)}:
            raise ValueError(f"{self.id}: row {min(elsewhere)!r} is not at scale {scale}")
        return [
            Run(home.id, row.name, scale, seed, self.settings(row, scale), tuple(home.metrics))
            for row in self.rows_at(scale)
            if not rows or row.name in rows
            for home in [row.home or self]
            for seed in seeds or home.scales[scale].seeds
        ]


def settings_hash(settings: dict[str, Any]) -> str:
    """12 hex digits that do not depend on the order of keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def load_tables(folder: Path, setting_names: Iterable[str] | None = None) -> list[Table]:
    """All table files of a folder in natural order (figure-2 before figure-10)."""
    names = None if setting_names is None else list(setting_names)

    def natural(path: Path) -> list:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)]

    return [load_table(path, names) for path in sorted(Path(folder).glob("*.toml"), key=natural)]


def load_table(path: Path, setting_names: Iterable[str] | None = None) -> Table:
    """Read and check one table file.

    Raises:
        ValueError: a missing or unknown key, row, scale, metric or setting; names the file and the nearest valid name.
    """
    where = Path(path).name
    try:
        raw = tomllib.loads(Path(path).read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{where}: {error}") from error
    _known(where, "key", raw, ["title", "source", "metrics", "scale", "row", "claim", "note", "published_on"])
    _needed(where, raw, ["title", "source", "metrics", "scale", "row"])
    metrics = raw["metrics"]
    for name, direction in metrics.items():
        _known(where, f"direction of {name}", [direction], DIRECTIONS)
    settings = None if setting_names is None else list(setting_names)
    scales = {name: _scale(Path(path), name, dict(body), settings) for name, body in raw["scale"].items()}
    others = {body["runs_of"] for body in raw["row"] if "runs_of" in body}
    homes = {name: load_table(Path(path).with_name(f"{name}.toml"), settings) for name in others}
    rows = tuple(_row(where, dict(body), scales, metrics, settings, homes) for body in raw["row"])
    names = [row.name for row in rows]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"{where}: row {sorted(repeated)[0]!r} is listed twice")
    claims = tuple(_claim(where, dict(body), scales, metrics, names) for body in raw.get("claim", []))
    texts = raw.get("note", ""), raw.get("published_on", "")
    return Table(Path(path).stem, raw["title"], raw["source"], metrics, scales, rows, claims, *texts)


def _scale(path: Path, name: str, body: dict, settings: list[str] | None) -> Scale:
    where = path.name
    if "settings_of" in body:
        source = path.with_name(body.pop("settings_of") + path.suffix)
        _known(where, "table in settings_of", [source.stem], [each.stem for each in path.parent.glob("*.toml")])
        other = tomllib.loads(source.read_text())["scale"]
        _known(where, "scale", [name], other)
        own = ("seeds", "expected_seconds", "measured_on")
        body = {key: value for key, value in other[name].items() if key not in own} | body
    seeds, seconds, on = body.pop("seeds", []), body.pop("expected_seconds", None), body.pop("measured_on", "")
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"{where}: scale {name} needs a list of different seeds, got {seeds}")
    if settings is not None:
        _known(where, "setting", body, [*settings, "seeds", "expected_seconds", "measured_on"])
    return Scale(name, tuple(seeds), seconds, body, on)


def _row(
    where: str, body: dict, scales: dict, metrics: dict, settings: list[str] | None, homes: dict[str, Table]
) -> Row:
    overrides = {name: body.pop(name) for name in scales if name in body}
    keys = ["name", "published", "published_error", "run", "runs_of", "scales"]
    _known(where, "key of a row", body, [*keys, *scales])
    _needed(where, body, ["name"])
    _known(where, "metric", body.get("published", {}), metrics)
    _known(where, "published metric", body.get("published_error", {}), body.get("published", {}))
    _known(where, "scale", body.get("scales", []), scales)
    if settings is not None:
        for part in (body.get("run", {}), *overrides.values()):
            _known(where, "setting", part, settings)
    only = tuple(body.pop("scales")) if "scales" in body else None
    home = None
    if "runs_of" in body:
        home = homes[body.pop("runs_of")]
        its_scales = home.row(body["name"]).scales or tuple(home.scales)
        only = tuple(name for name in only or scales if name in its_scales)
        if "run" in body or overrides:
            raise ValueError(f"{where}: row {body['name']!r} takes its settings from {home.id} and can have none here")
    return Row(**body, scales=only, overrides=overrides, home=home)


def _claim(where: str, body: dict, scales: dict, metrics: dict, rows: list[str]) -> Claim:
    _known(where, "key of a claim", body, Claim.__dataclass_fields__)
    for name in ("rows", "scales"):
        if name in body:
            body[name] = tuple(body[name])
    _needed(where, body, ["text", "metric"])
    claim = Claim(**body)
    _known(where, "metric", [claim.metric], metrics)
    _known(where, "row", claim.named_rows, rows)
    _known(where, "scale", claim.scales or (), scales)
    forms = [
        bool(claim.better and claim.than),
        bool(claim.row) and (claim.at_least is not None or claim.at_most is not None),
        len(claim.rows) >= 3 and claim.trend in ("rises", "falls"),
    ]
    if sum(forms) != 1:
        raise ValueError(
            f"{where}: claim {claim.text!r} needs better and than, or row with a bound, or rows with a trend"
        )
    return claim


def _needed(where: str, given: dict, keys: list[str]) -> None:
    if missing := [key for key in keys if key not in given]:
        raise ValueError(f"{where}: {missing[0]} is missing")


def _known(where: str, what: str, given: Iterable[str], valid: Iterable[str]) -> None:
    valid = list(valid)
    for name in given:
        if name not in valid:
            near = difflib.get_close_matches(str(name), valid, 1, 0.0)
            raise ValueError(f"{where}: unknown {what} {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
