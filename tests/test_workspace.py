import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import results  # noqa: E402
import workspace  # noqa: E402
from shared_utils.tables import load_tables  # noqa: E402

ENTRIES = workspace.projects(built=False)
BUILT = [entry["name"] for entry in workspace.projects()]


def tracked() -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def test_nine_projects_with_papers_and_a_known_status():
    assert len({entry["name"] for entry in ENTRIES}) == len(ENTRIES) == 9
    for entry in ENTRIES:
        assert entry["status"] in ("built", "planned")
        assert entry["papers"] and all({"arxiv", "title", "venue"} <= paper.keys() for paper in entry["papers"])
        assert all(re.fullmatch(r"\d{4}\.\d{5}", paper["arxiv"]) for paper in entry["papers"])


def test_every_folder_with_a_pyproject_is_listed_and_every_built_project_is_a_folder():
    folders = {path.parent.name for path in ROOT.glob("*/pyproject.toml")}
    assert folders == {"shared-utils", *BUILT}


def test_tables_are_found_in_a_wheel_too():
    """An installed package has no checkout around it: only `project_folder` knows where tables/ is."""
    by_hand = re.compile(r"__file__\)\.?(resolve\(\)\.)?(parents|parent\.parent)")
    sources = [path for path in ROOT.glob("*/src/**/*.py") if path.name != "folders.py"]
    assert len(sources) > 200 and not [str(path) for path in sources if by_hand.search(path.read_text())]


@pytest.mark.parametrize("name", BUILT)
def test_built_project_is_whole(name):
    package = next(entry["package"] for entry in ENTRIES if entry["name"] == name)
    for part in ("README.md", "Makefile", "pyproject.toml", "results/RESULTS.md", f"src/{package}/cli.py"):
        assert (ROOT / name / part).is_file(), part
    assert list((ROOT / name / "tables").glob("*.toml"))
    assert list((ROOT / name / "tests").glob("test_*.py"))


@pytest.mark.parametrize("name", BUILT)
def test_the_help_of_run_lists_the_scales_of_the_tables(name):
    package = next(entry["package"] for entry in ENTRIES if entry["name"] == name)
    source = (ROOT / name / "src" / package / "cli.py").read_text()
    (listed,) = re.findall(r'scale: str = "embedded"\n    """(?:Scale to run: )?(smoke, .*)\."""', source)
    tables = [tomllib.loads(path.read_text()) for path in (ROOT / name / "tables").glob("*.toml")]
    assert set(re.split(r", | or ", listed)) == {scale for table in tables for scale in table["scale"]}


@pytest.mark.parametrize("name", BUILT)
def test_a_claim_can_be_decided_by_the_seeds_of_its_scale(name):
    """At scale embedded a table lists the seeds of the demo; the record has more."""
    for table in load_tables(ROOT / name / "tables"):
        for scale in set(table.scales) - {"smoke", "embedded"}:
            claims = [claim for claim in table.claims if not claim.exact and scale in (claim.scales or table.scales)]
            assert not claims or len(table.scales[scale].seeds) >= 2, f"{table.id}, {scale}"


def dependencies(name: str) -> dict[str, str]:
    listed = tomllib.loads((ROOT / name / "pyproject.toml").read_text())["project"]["dependencies"]
    return {re.split(r"[<>=!\[; ]", each)[0]: each for each in listed}


@pytest.mark.parametrize("name", BUILT)
def test_a_project_lists_what_the_shared_code_needs_and_not_a_package_of_its_name(name):
    assert dependencies("shared-utils").keys() <= dependencies(name).keys()
    assert not {"shared-utils", "shared_utils", *BUILT} & dependencies(name).keys()


def test_projects_do_not_import_each_other():
    packages = {entry["name"]: entry["package"] for entry in ENTRIES}
    for name in BUILT:
        others = [package for other, package in packages.items() if other != name]
        pattern = re.compile(rf"^\s*(?:from|import) ({'|'.join(others)})\b", re.M)
        for path in (ROOT / name / "src").rglob("*.py"):
            assert not pattern.search(path.read_text()), path


def test_root_results_and_readme_are_what_the_run_logs_say():
    assert (ROOT / "RESULTS.md").read_text() == results.results()
    assert all(path.read_text() == text for path, text in results.readmes().items())


def test_every_built_paper_has_a_headline_and_its_project_a_picture():
    for entry in workspace.projects():
        project = results.Project(entry, ROOT)
        assert all(project.headline(paper) for paper in entry["papers"])
        assert (project.results / "figures" / f"{entry['picture']['figure']}.png").is_file()


def test_no_tracked_text_names_a_path_of_some_machine():
    # the start of an absolute path; put together here so that this file does not match itself
    pattern = re.compile(r"(?<![\w.~$}/-])/(?:" + "|".join(["home", "Users", "root", "work", "mnt"]) + r")/\w")
    for name in tracked():
        path = ROOT / name
        if not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        assert not pattern.search(text), f"{name}: {pattern.search(text)}"


def test_lock_file_names_no_host_and_no_path():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.match(r"[a-z0-9-]+==[\w.+!]+( ;.*)?$", line), line


def test_an_unknown_project_is_wrong_usage():
    command = [sys.executable, str(ROOT / "tools" / "demo.py"), "nonesuch"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "nonesuch" in done.stderr
