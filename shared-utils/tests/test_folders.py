import pytest

from shared_utils.benchmark import record
from shared_utils.folders import project_folder, results_folder, runs_folder


@pytest.fixture
def checkout(tmp_path):
    package = tmp_path / "project" / "src" / "package"
    package.mkdir(parents=True)
    for folder in ("tables", "results"):
        (tmp_path / "project" / folder).mkdir()
    return package


@pytest.fixture
def installed(tmp_path):
    package = tmp_path / "site-packages" / "package"
    for folder in ("tables", "results"):
        (package / folder).mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "results" / "embedded.jsonl").write_text("{}\n")
    return package


def test_a_checkout_has_all_beside_src(checkout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project = project_folder(str(checkout / "experiments.py"))
    assert project == tmp_path / "project"
    assert runs_folder(project) == project / "runs" and results_folder(project) == project / "results"


def test_an_installed_package_is_read_and_never_written_to(installed, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    project = project_folder(str(installed / "experiments.py"))
    assert project == installed and runs_folder(project) == tmp_path / "work" / "runs"
    for _ in range(2):
        copy = results_folder(project)
        assert copy == tmp_path / "work" / "results" and (copy / "embedded.jsonl").read_text() == "{}\n"
    with pytest.raises(ValueError, match="pip install -e"):
        record(project)
