"""`make keep`: save the verdicts of your demo in results/machines/, next to those of other kinds of machine.

A verdict that depends on the processor does not count: "holds" in the README means that it held on every kind tried.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from shared_utils.report import NOT_MEASURED, Verdict, judge
from shared_utils.runlog import RunLog, provenance
from shared_utils.tables import load_tables
from workspace import ROOT, projects

SCALE = "embedded"


@dataclass(frozen=True)
class Machine:
    """Verdicts of one machine's demo, by project, table and text of the claim."""

    device: str
    commit: str
    versions: dict[str, str]
    verdicts: dict[str, dict[str, dict[str, str]]]
    seeds: dict[str, dict[str, list[int]]]  # that its demo ran, by project and table: the record may have more

    def judged(self, project: str, table: str, verdict: Verdict) -> str:
        """The verdict on this machine; empty if the claim was not judged or has another scale."""
        if verdict.scale != SCALE:
            return ""
        return self.verdicts.get(project, {}).get(table, {}).get(verdict.claim.text, "")


def machines(root: Path = ROOT) -> list[Machine]:
    """All saved machines."""
    return [Machine(**json.loads(path.read_text())) for path in sorted((root / "results" / "machines").glob("*.json"))]


def keep(root: Path = ROOT) -> Path:
    """Judge the claims on the runs of this machine's demo and write the verdicts; returns the file.

    Raises:
        RuntimeError: no demo was run, it ran on uncommitted code, or it lacks projects whose verdicts are kept and were
            judged at another commit; those of the same commit stay.
    """
    verdicts: dict[str, dict[str, dict[str, str]]] = {}
    seeds: dict[str, dict[str, list[int]]] = {}
    for entry in projects(root=root):
        log = RunLog(root / entry["name"] / "runs" / f"{SCALE}.jsonl")
        if any(not record["clean"] for record in log.records()):
            raise RuntimeError(f"{entry['name']}: runs/{SCALE}.jsonl was measured on uncommitted code")
        for record in sorted(log.records(), key=lambda record: record["seed"]):
            of_table = seeds.setdefault(entry["name"], {}).setdefault(record["table"], [])
            of_table += [record["seed"]] * (record["seed"] not in of_table)
        for table in load_tables(root / entry["name"] / "tables"):
            judged = {v.claim.text: v.verdict for v in judge(table, SCALE, log) if v.verdict != NOT_MEASURED}
            if judged:
                verdicts.setdefault(entry["name"], {})[table.id] = judged
    if not verdicts:
        raise RuntimeError("you have no runs yet: run make demo")
    here = provenance(root, ("numpy", "torchvision", "lightning"))
    slug = re.sub(r"[^a-z0-9]+", "-", here["device"].lower()).strip("-")
    path = root / "results" / "machines" / f"{slug}.json"
    kept = Machine(**json.loads(path.read_text())) if path.exists() else None
    if kept and (lost := kept.verdicts.keys() - verdicts.keys()):
        if kept.commit != here["commit"]:
            raise RuntimeError(f"your demo lacks {', '.join(sorted(lost))}, which {path.name} has: run make demo")
        verdicts, seeds = kept.verdicts | verdicts, kept.seeds | seeds
    machine = Machine(here["device"], here["commit"], here["versions"], verdicts, seeds)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(machine), indent=1) + "\n")
    return path


if __name__ == "__main__":
    try:
        print(f"{keep().relative_to(ROOT)} written; make tables adds it to RESULTS.md")
    except RuntimeError as error:
        raise SystemExit(f"keep: {error}") from None
