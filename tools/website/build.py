"""The results site: a home page, a page per project and per table, from table files and committed run logs only.

Pages are Markdown with HTML tables, rendered from templates/ (which escape every string) into a temporary folder;
MkDocs with the Material theme turns them into static files that need no server or network.
"""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import jinja2
from mkdocs.commands.build import build as build_pages
from mkdocs.config import load_config

from results import CommittedLog, benches, kill_drill, mutants, speed, verdicts
from shared_utils.report import NOT_MEASURED, Verdict, comparison, judge, measured
from shared_utils.runlog import RunLog
from shared_utils.tables import Row, Table, load_tables
from workspace import ROOT, projects

HERE = Path(__file__).resolve().parent

PAGES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(HERE / "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
PAGES.filters["yaml"] = lambda text: json.dumps(escape(text, quote=False))  # the theme prints titles unescaped


@dataclass(frozen=True)
class Line:
    """One row of a table at one scale."""

    name: str
    cells: list[tuple[str, str]]  # published and ours, by metric
    seeds: int
    command: str


@dataclass(frozen=True)
class Section:
    """One table at one scale."""

    scale: str
    published: bool  # whether there is a column of published figures
    lines: list[Line]
    verdicts: list[Verdict]
    origins: list[dict[str, Any]]
    data_sets: list[dict[str, str]]


@dataclass(frozen=True)
class TablePage:
    """One table with all its scales except smoke."""

    table: Table
    sections: list[Section]
    verdicts: list[Verdict]  # at all scales, each claim at least once
    figure: str | None

    @property
    def scales_measured(self) -> list[str]:
        """Scales at which at least one row was measured."""
        return [section.scale for section in self.sections if any(line.seeds for line in section.lines)]


@dataclass(frozen=True)
class Project:
    """A built project: its entry in workspace.toml, its tables and the contents of its results folder."""

    entry: dict[str, Any]
    tables: list[TablePage]
    figures: list[str]
    logs: list[str]
    own_sections: str  # Markdown that the project adds to its RESULTS.md


def load_project(entry: dict[str, Any], root: Path) -> Project:
    """Everything that the site shows about a project."""
    folder = root / entry["name"]
    results = folder / "results"
    logs = {path.stem: CommittedLog(path) for path in sorted(results.glob("*.jsonl"))}
    figures = [path.name for path in sorted((results / "figures").glob("*.png"))]
    pages = []
    for table in load_tables(folder / "tables"):
        sections = [
            load_section(entry["name"], table, scale, logs.get(scale)) for scale in table.scales if scale != "smoke"
        ]
        if sections:
            figure = f"{table.id}.png"
            pages.append(TablePage(table, sections, verdicts(table, logs), figure if figure in figures else None))
    page = (results / "RESULTS.md").read_text() if (results / "RESULTS.md").exists() else ""
    _, heading, own_sections = page.partition("## Where the numbers come from")[2].partition("\n## ")
    return Project(entry, pages, figures, [path.path.name for path in logs.values()], heading + own_sections)


def load_section(project: str, table: Table, scale: str, log: RunLog | None) -> Section:
    """Rows (as in RESULTS.md), verdicts and provenance of one table at one scale."""
    found, lines = measured(table, scale, log), []
    frame = comparison(table, scale, log)
    for row in table.rows_at(scale):
        cells = frame[frame.row == row.name]
        seeds = sorted(found.get(row.name, {}))
        how = command(project, table, row, scale, seeds)
        pairs = list(zip(cells.published.replace("", "–"), cells.ours, strict=True))
        lines.append(Line(row.name, pairs, len(seeds), how))
    records = [record for seeds in found.values() for record in seeds.values()]
    published, verdicts_here = bool(frame.published.any()), judge(table, scale, log)
    return Section(scale, published, lines, verdicts_here, origins(records), data_sets(records))


def command(project: str, table: Table, row: Row, scale: str, seeds: Sequence[int]) -> str:
    """The shell command that runs one row with the seeds that were measured; if none were, with the table's."""
    home = row.home or table
    words = [project, "run", home.id, "--scale", scale, "--rows", row.name]
    if seeds and set(seeds) != set(home.scales[scale].seeds):
        words += ["--seeds", *map(str, seeds)]
    return f"cd {project} && {shlex.join(words)}"


def origins(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs grouped by machine, versions and commit, with their dates and cost."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        machine = f"{record['device']}, {record['threads']} threads"
        versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        groups.setdefault((str(record["commit"]), machine, versions), []).append(record)
    return [
        {
            "commit": commit,
            "machine": machine,
            "versions": versions,
            "runs": len(group),
            "first": min(record["started"] for record in group)[:10],
            "last": max(record["started"] for record in group)[:10],
            "seconds": f"{sum(record['seconds'] for record in group):,.1f}",
            "memory": f"{max(record['peak_memory_mb'] for record in group):,.0f}",
        }
        for (commit, machine, versions), group in sorted(groups.items())
    ]


def data_sets(records: list[dict[str, Any]]) -> list[dict[str, str]]:
    """All data sets named by the runs, each once: name, further facts, checksum."""

    def named(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict) and ("name" in node or "set" in node):
            yield node
        elif isinstance(node, dict | list):
            for child in node.values() if isinstance(node, dict) else node:
                yield from named(child)

    found = set()
    for facts in named([record["dataset"] for record in records]):
        rest = [f"{key} {value}" for key, value in facts.items() if key not in ("name", "set", "sha256")]
        found.add((facts.get("name") or facts["set"], ", ".join(rest), facts.get("sha256", "–")))
    return [dict(zip(("name", "facts", "sha256"), each, strict=True)) for each in sorted(found)]


def count(pages: Sequence[TablePage]) -> dict[str, int]:
    """Number of verdicts by word, in display order."""
    words = Counter(verdict.verdict for page in pages for verdict in page.verdicts)
    return {word: words[word] for word in ("holds", "fails", "undecided", NOT_MEASURED) if words[word]}


def build(site: Path, root: Path = ROOT) -> None:
    """Write the whole site into the folder `site`, replacing its contents."""
    entries = projects(built=False, root=root)
    built = [load_project(entry, root) for entry in entries if entry["status"] == "built"]
    planned = [entry for entry in entries if entry["status"] != "built"]
    with tempfile.TemporaryDirectory() as temporary:
        sources = Path(temporary)
        shutil.copytree(HERE / "assets", sources / "assets")
        write(sources / "index.md", "index.md", projects=built, planned=planned)
        write(sources / "claims.md", "claims.md", projects=built)
        speeds = [f"## {each.entry['name']}\n\n{speed(benches(each.entry, root))}" for each in built]
        (sources / "speed.md").write_text("\n\n".join(["# Speed", *speeds]) + "\n")
        (sources / "drill.md").write_text(f"# Kill drill\n\n{kill_drill(root)}\n")
        (sources / "mutants.md").write_text(f"---\nhide: [toc]\n---\n# Mutants\n\n{mutants(root)}\n")
        pages = {"Home": "index.md", "All claims": "claims.md", "Speed": "speed.md", "Kill drill": "drill.md"}
        pages |= {"Mutants": "mutants.md"}
        navigation: list[dict[str, Any]] = [{title: page} for title, page in pages.items()]
        for project in built:
            name = project.entry["name"]
            folder = sources / name
            shutil.copytree(root / name / "results", folder, ignore=shutil.ignore_patterns("RESULTS.md"))
            write(folder / "index.md", "project.md", project=project)
            for page in project.tables:
                write(folder / f"{page.table.id}.md", "table.md", project=project, page=page)
            tables = [{page.table.id: f"{name}/{page.table.id}.md"} for page in project.tables]
            navigation.append({name: [f"{name}/index.md", *tables]})
        folders = {"docs_dir": str(sources), "site_dir": str(site)}
        build_pages(load_config(str(HERE / "mkdocs.yml"), **folders, nav=navigation, strict=True))


def write(path: Path, template: str, **values: Any) -> None:
    """Write one generated page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PAGES.get_template(template).render(count=count, **values))


if __name__ == "__main__":
    build(ROOT / "site")
    print("site/index.html")
