import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from shared_utils.report import NOT_MEASURED, measured
from shared_utils.runlog import RunLog
from shared_utils.tables import load_table, load_tables

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import workspace  # noqa: E402
from website.build import build  # noqa: E402

BUILT = [entry["name"] for entry in workspace.projects()]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site of this workspace, built once however many processes test it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with open(folder / "site.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "site.built").exists():
            build(folder / "site")
            (folder / "site.built").touch()
    return folder / "site"


class Page(HTMLParser):
    """Links, ids, and tables by the h2 above them: rows of cell texts without the head."""

    def __init__(self, path):
        super().__init__()
        self.links, self.resources, self.ids, self.tables = [], [], set(), {}
        self.scale, self.cell, self.heading, self.commands = "", None, None, []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        if tag == "a":
            self.links.append(attributes.get("href", ""))
        if tag in ("img", "script") or (tag == "link" and attributes.get("rel") == "stylesheet"):
            self.resources.append(attributes.get("src") or attributes.get("href") or "")
        if "data-clipboard-text" in attributes:
            self.commands.append(attributes["data-clipboard-text"])
        if tag == "h2":
            self.heading = ""
        if tag == "table":
            self.tables.setdefault(self.scale, []).append([])
        if tag == "tr":
            self.tables[self.scale][-1].append([])
        if tag in ("td", "th"):
            self.cell = ""

    def handle_endtag(self, tag):
        if tag == "h2":
            self.scale, self.heading = self.heading.removeprefix("Scale "), None
        if tag in ("td", "th"):
            self.tables[self.scale][-1][-1].append(" ".join(self.cell.split()))
            self.cell = None
        if tag == "thead":
            self.tables[self.scale][-1] = []

    def handle_data(self, data):
        if self.cell is not None:
            self.cell += data
        if self.heading is not None:
            self.heading += data


def test_links_resolve_and_nothing_is_loaded_from_elsewhere(site):
    pages = {path: Page(path) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in {*page.links, *page.resources} - {""}:
            where = urlsplit(link)
            if where.scheme:
                assert link in page.links and where.netloc == "arxiv.org", f"{path}: {link}"
                continue
            base = site if where.path.startswith("/") else path.parent
            target = (base / unquote(where.path).lstrip("/")).resolve() if where.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path}: {link}"
            assert not where.fragment or where.fragment in pages[target].ids, f"{path}: {link}"


def results_of(project):
    """Lines of each table and its claims in a project's RESULTS.md, by table and scale."""
    text = (ROOT / project / "results" / "RESULTS.md").read_text().partition("## Where the numbers come from")[0]
    found = {}
    for section in re.split(r"^### ", text, flags=re.M)[1:]:
        table, scale = re.match(r"(\S+), scale (\S+)", section).groups()
        found[table, scale] = {"row": [], "claim": []}
        lines = []
        for line in section.splitlines():
            if re.match(r"\| (row|claim) +\|", line):
                lines = found[table, scale][line.split()[1]]
            elif line.startswith("| "):
                lines.append(" ".join(line.split()))
    return found


@pytest.mark.parametrize("project", BUILT)
def test_every_figure_is_that_of_results_md(site, project):
    for (table, scale), wanted in results_of(project).items():
        rows, *claims = Page(site / project / f"{table}.html").tables[scale]
        if wanted["row"]:
            assert [f"| {' | '.join(cells[:-2])} |" for cells in rows] == wanted["row"]
        else:
            assert {cell for cells in rows for cell in cells[1:-2]} == {NOT_MEASURED}
        shown = []
        for claim, verdict, effect in claims[0] if wanted["claim"] else []:
            word, note = re.fullmatch(r"(holds|fails|undecided|not measured) ?(.*)", verdict).groups()
            figures = "" if effect == "–" else f": {effect}" + (f"; {note}" if note else "")
            shown.append(f"| {claim} | {word}{figures} |")
        assert shown == wanted["claim"]


@pytest.mark.parametrize("project", BUILT)
def test_every_measured_row_stands_there_with_the_command_of_its_very_runs(site, project):
    tables = {table.id: table for table in load_tables(ROOT / project / "tables")}
    for table in tables.values():
        logs = {scale: RunLog(ROOT / project / "results" / f"{scale}.jsonl") for scale in table.scales}
        logs.pop("smoke", None)
        commands = iter(Page(site / project / f"{table.id}.html").commands) if logs else iter(())
        for scale, log in logs.items():
            found = measured(table, scale, log)
            for row in table.rows_at(scale):
                words = shlex.split(next(commands))
                home, seeds = words[5], [int(seed) for seed in words[11:]]
                assert words[:5] == ["cd", project, "&&", project, "run"]
                assert words[6:10] == ["--scale", scale, "--rows", row.name]
                assert words[10:11] == (["--seeds"] if seeds else [])
                runs = tables[home].runs(scale, [row.name], seeds)
                if row.name in found:
                    assert {each.seed for each in runs} == found[row.name].keys()
                    assert {each.row for each in runs} == {row.name}
        assert next(commands, None) is None


@pytest.mark.parametrize("project", ["prdc-metrics", "fl-linkability"])
def test_the_command_of_a_row_is_understood_by_the_project(site, project):
    commands = [command for path in sorted((site / project).glob("*.html")) for command in Page(path).commands]
    hardest = max(commands, key=lambda command: len(re.findall(r"[^\w\s]", command)))
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(f"{hardest} --dry-run", shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and hardest.split()[4] in done.stdout, done.stderr


# ---- a small workspace ------------------------------------------------------------

ODD = "a < b & *c* _d_ `e` | \"f\" 'g' <script>document.title = 'broken'</script>"
TABLE = """
title = "T <b>bold</b> & *more*"
source = "arXiv 0, Table 1"
note = "<i>no markup</i>"
metrics = { error = "lower" }
[scale.embedded]
seeds = [20, 21]
"""
WORKSPACE = """
[[project]]
name = "one"
status = "built"
summary = "<u>first</u>"
picture = { figure = "table-1", caption = "<em>c</em>" }
papers = [{ arxiv = "0000.00000", title = "P & Q", venue = "V" }]
datasets = [{ name = "<d>", scale = ["embedded"], from = "here" }]
hardware = { embedded = "2 cores" }
[[project]]
name = "two"
status = "planned"
summary = "second"
papers = [{ arxiv = "0000.00001", title = "R", venue = "V" }]
"""
ERRORS = {"nine": 9, "minus": -1, "thousand": 1234, ODD: 10.5, "none": None, "hundred": 100}


@pytest.fixture(scope="session")
def small_site(tmp_path_factory):
    root = tmp_path_factory.mktemp("workspace")
    (root / "workspace.toml").write_text(WORKSPACE)
    (root / "one" / "tables").mkdir(parents=True)
    rows = [f"[[row]]\nname = {json.dumps(name)}\nrun = {{ size = {i} }}\n" for i, name in enumerate(ERRORS)]
    claim = f'[[claim]]\ntext = "<s>low</s>"\nmetric = "error"\nrow = {json.dumps(ODD)}\nat_most = 11\n'
    (root / "one" / "tables" / "table-1.toml").write_text(TABLE + "".join(rows) + claim)
    table = load_table(root / "one" / "tables" / "table-1.toml")
    source = {"seconds": 1.5, "peak_memory_mb": 10, "threads": 1, "device": "CPU <x>", "commit": "c" * 40}
    source |= {"started": "2000-01-02T03:04:05+00:00", "versions": {"torch": "0"}, "clean": True}
    source |= {"dataset": {"train": {"name": "<digits>", "n": 5, "sha256": "ab12"}}}
    log = RunLog(root / "one" / "results" / "embedded.jsonl")
    for run in table.runs("embedded"):
        if ERRORS[run.row] is not None:
            record = {"table": run.table, "row": run.row, "scale": run.scale, "seed": run.seed}
            log.append(record | source | {"settings_hash": run.key[-1], "metrics": {"error": ERRORS[run.row]}})
    build(root / "site", root)
    return root / "site"


def test_text_is_shown_as_it_is_written(small_site):
    page = small_site / "one" / "table-1.html"
    rows, claims, origins, data = Page(page).tables["embedded"]
    assert [row[0] for row in rows] == [" ".join(name.split()) for name in ERRORS]
    assert rows[3][1:3] == ["10.500 ± 0.000", "2"] and rows[4][1:3] == [NOT_MEASURED, "0"]
    assert shlex.split(rows[3][3])[-1] == ODD
    assert claims == [["<s>low</s>", "holds", "10.500 [10.500, 10.500], n=2"]]
    assert origins == [["c" * 12, "CPU <x>, 1 threads", "torch 0", "10", "2000-01-02", "2000-01-02", "15.0", "10"]]
    assert data == [["<digits>", "n 5", "ab12"]]
    for path in small_site.rglob("*.html"):
        assert not re.search(r"<(script>document|b>bold|i>no|u>first|em>c|s>low|d>|digits>)", path.read_text()), path


# ---- in a browser ------------------------------------------------------------


@pytest.fixture
def browser():
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options, Service(driver))
    yield window
    window.quit()


def test_a_column_sorts_by_its_figures_and_what_was_not_measured_stays_last(small_site, browser):
    browser.get((small_site / "one" / "table-1.html").as_uri())

    def names():
        return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "table.results tbody th")]

    measured_head = browser.find_elements(By.CSS_SELECTOR, "table.results thead tr:last-child th")[2]
    order = ["minus", "nine", " ".join(ODD.split()), "hundred", "thousand"]
    measured_head.find_element(By.TAG_NAME, "button").click()
    assert names() == [*order, "none"] and measured_head.get_attribute("aria-sort") == "ascending"
    measured_head.find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
    assert names() == [*order[::-1], "none"] and measured_head.get_attribute("aria-sort") == "descending"
    assert "broken" not in browser.title


@pytest.mark.parametrize("width", [390, 1400])
def test_pages_fit_their_window_and_complain_of_nothing(site, browser, width):
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    widest = max(site.glob("*/*.html"), key=lambda path: path.read_text().count('class="group"'))
    for path in [site / "index.html", site / "claims.html", *site.glob("*/index.html"), widest]:
        browser.get(path.as_uri())
        inner, body = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert inner == width and body <= width, path
    box = browser.find_element(By.CSS_SELECTOR, ".box")  # of the widest table: it scrolls by itself
    assert browser.execute_script("return arguments[0].scrollWidth > arguments[0].clientWidth", box)
    assert browser.get_log("browser") == []


def test_search_finds_a_row_without_a_server(site, browser):
    browser.get((site / "index.html").as_uri())
    browser.set_window_size(1400, 900)
    browser.find_element(By.CSS_SELECTOR, "input[name=query]").send_keys("shuffled")
    found = WebDriverWait(browser, 20).until(
        lambda window: window.find_elements(By.CSS_SELECTOR, ".md-search-result__link")
    )
    assert any("rebias/controls.html" in each.get_attribute("href") for each in found)
    assert browser.get_log("browser") == []
