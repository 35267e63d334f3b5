"""What the root Makefile asks for: the list of projects, the demo across them, and the root RESULTS.md.

`projects` needs the standard library alone, so that make can read the list before anything is installed; the
other verbs run inside .venv.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent
SCALE = "embedded"


def projects(built: bool = True, root: Path = ROOT) -> list[dict]:
    """Entries of workspace.toml, in its order; only the built ones unless told otherwise."""
    entries = tomllib.loads((root / "workspace.toml").read_text())["project"]
    return [entry for entry in entries if entry["status"] == "built" or not built]


# ---- demo ------------------------------------------------------------


def demo(names: list[str]) -> int:
    """Run the named projects at embedded scale; exit code of the first that fails, else 0.

    Each project resumes from its own runs/: a demo that was killed is continued by the next one.
    """
    from shared_utils.logging import progress

    out, first_failure = sys.stdout, 0
    plan = {name: _runs(name) for name in names}
    with progress() as bar:
        if out.isatty():
            out = sys.stdout  # rich's, which prints above the bars
        overall = bar.add_task("demo", total=sum(map(len, plan.values())))
        for name, wanted in plan.items():
            bar.update(overall, description=f"demo: {name}")
            code = _stream(name, wanted, out, lambda step: bar.advance(overall, step))
            first_failure = first_failure or code
            if code == 130:
                break
    if first_failure != 130:
        for name in names:
            code = subprocess.run(_command(name, "tables"), cwd=ROOT / name).returncode
            first_failure = first_failure or code
        (ROOT / "RESULTS.md").write_text(results())
    _farewell(names, first_failure)
    return first_failure


def _command(name: str, *words: str) -> list[str]:
    return [str(ROOT / ".venv" / "bin" / name), *words]


def _runs(name: str) -> set[tuple]:
    """Keys of all runs that a project's tables have at embedded scale."""
    from shared_utils.tables import load_tables

    tables = [table for table in load_tables(ROOT / name / "tables") if SCALE in table.scales]
    return {run.key for table in tables for run in table.runs(SCALE)}


def _stream(name: str, wanted: set[tuple], out, advance) -> int:
    """Run one project, pass its output on, and advance by the records that appear in its run log."""
    from shared_utils.runlog import RunLog

    log = RunLog(ROOT / name / "runs" / f"{SCALE}.jsonl")
    size = log.path.stat().st_size if log.path.exists() else 0
    left = len(wanted - log.keys())
    advance(len(wanted) - left)
    child = subprocess.Popen(
        _command(name, "run", "--scale", SCALE),
        cwd=ROOT / name,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    line: str | None = ""
    try:
        while line is not None:
            with contextlib.suppress(queue.Empty):
                line = lines.get(timeout=0.5)
                out.write(line or "")
                out.flush()
            now = log.path.stat().st_size if log.path.exists() else 0
            if now > size:
                with open(log.path, "rb") as file:
                    file.seek(size)
                    new = min(file.read(now - size).count(b"\n"), left)
                size, left = now, left - new
                advance(new)
        code = child.wait()
    except KeyboardInterrupt:  # the terminal sent it to the child too, which saves its state and ends
        child.wait()
        return 130
    advance(left if code == 0 else 0)
    return 128 - code if code < 0 else code


def _farewell(names: list[str], code: int) -> None:
    if code == 130:
        return print("Interrupted. Finished runs are kept: `make demo` continues.")
    print("\nWhere to look")
    print("  RESULTS.md                            every table and claim, as we measured them")
    for name in names:
        print(f"  {name + '/results/RESULTS.md':<37} published | ours, with figures beside it")
        print(f"  {f'{name}/runs/{SCALE}.jsonl':<37} your own runs, one JSON line each")
    if code:
        print(f"A project failed (exit code {code}), see its message above.", file=sys.stderr)


# ---- RESULTS.md ------------------------------------------------------------


def results(root: Path = ROOT) -> str:
    """The root RESULTS.md, from table files and committed run logs alone."""
    intro = (
        "Generated by `make tables` from the committed run logs; edits are overwritten. "
        "A claim's effect is the mean over seeds with its 95 % interval, paired where it compares two rows."
    )
    parts = ["# Results", intro]
    parts += [_project(entry, root) for entry in projects(built=False, root=root)]
    return "\n\n".join(parts) + "\n"


def _project(entry: dict, root: Path) -> str:
    name = entry["name"]
    papers = "; ".join(f"*{each['title']}*, {each['venue']}, arXiv {each['arxiv']}" for each in entry["papers"])
    head = f"## {name}\n\n{papers}."
    if entry["status"] != "built":
        return f"{head} Planned: not built yet."
    from shared_utils.report import NOT_MEASURED, judge, number, values
    from shared_utils.runlog import RunLog
    from shared_utils.tables import load_tables

    rows, claims = [], []
    for table in load_tables(root / name / "tables"):
        logs = {s: RunLog(root / name / "results" / f"{s}.jsonl") for s in table.scales if s != "smoke"}
        measured = ", ".join(scale for scale, log in logs.items() if values(table, scale, log))
        rows.append([table.id, table.title, measured or NOT_MEASURED, f"[page]({name}/results/RESULTS.md)"])
        verdicts = [verdict for scale, log in logs.items() for verdict in judge(table, scale, log)]
        for claim in table.claims:
            of_claim = [verdict for verdict in verdicts if verdict.claim == claim]
            seen = [verdict for verdict in of_claim if verdict.effect is not None]
            for v in seen:
                span = f" [{number(v.low)}, {number(v.high)}]" if v.n_seeds > 1 else ""
                effect = f"{number(v.effect)}{span} (n={v.n_seeds}, {v.scale})"
                claims.append([table.id, claim.text, v.verdict, effect])
            if not seen:
                claims.append([table.id, claim.text, NOT_MEASURED, ""])
    text = head + "\n\n" + _markdown(["table", "title", "scales measured", "where"], rows)
    return text + ("\n\n" + _markdown(["table", "claim", "verdict", "effect"], claims) if claims else "")


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main(words: list[str]) -> int:
    """Verbs: projects, demo [PROJECT ...], results."""
    verb, *chosen = words or [""]
    built = [entry["name"] for entry in projects()]
    unknown = [name for name in chosen if name not in built]
    if verb not in ("projects", "demo", "results") or unknown:
        message = f"no built project {unknown[0]!r}; built: {' '.join(built)}" if unknown else main.__doc__
        print(message, file=sys.stderr)
        return 2
    if verb == "projects":
        print(*built)
    elif verb == "results":
        (ROOT / "RESULTS.md").write_text(results())
    else:
        return demo(chosen or built)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
