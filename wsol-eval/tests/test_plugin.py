"""A method of the user's own, taken from the README as it stands: train, eval, search and ledger."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from test_train import RECIPE

from wsol_eval import protocol
from wsol_eval.cutouts import make_split
from wsol_eval.models import Network, plugin
from wsol_eval.protocol import draw
from wsol_eval.recipe import Recipe
from wsol_eval.sources import MemorySource
from wsol_eval.train import build_network, fit, load_trained, make_fabric

README = (Path(__file__).parents[1] / "README.md").read_text()
CODE = re.search(r"```python\n(# peak\.py\n.*?)```", README, re.DOTALL).group(1)


@pytest.fixture
def method(tmp_path):
    (tmp_path / "peak.py").write_text(CODE)
    return f"{tmp_path / 'peak.py'}:Peak"


@pytest.fixture(scope="module")
def digits():
    return {name: MemorySource(make_split(name, 48, 1), name) for name in ("train", "val", "test")}


def test_the_readmes_method_is_searched_and_judged_as_ours_are(method, digits, tmp_path):
    base, fabric = replace(RECIPE, method=method, epochs=1), make_fabric("cpu")
    options = (base, "photographs", 2, 7, digits, fabric, tmp_path / "out", "auto", 0.1)
    found, entry, ledger = protocol.run_in_folder(*options)
    trials = ledger.find("trial")
    tried = [dict(trial["hyperparameters"]["own"])["sharpness"] for trial in trials]
    assert len(set(tried)) == 2 and all(0.5 <= value <= 4 for value in tried)
    assert trials[0]["hyperparameters"]["lr"] == draw("photographs", "cam", 7, 0)["lr"]  # shared by all methods
    assert entry["name"] == "Peak" and ledger.counts()["looks_at_test"] == 1
    assert dict(found.recipe.own)["sharpness"] == tried[found.best]
    network, recipe = load_trained(next((tmp_path / "out").glob(f"Peak-*-{found.best}.pt")), 10)
    assert recipe == found.recipe and network.sharpness == tried[found.best]
    again = protocol.run_in_folder(*options)
    assert again[1]["metrics"] == entry["metrics"] and len(again[2].find("trial")) == 2  # from the ledger
    (tmp_path / "peak.py").write_text(CODE.replace("0.01 *", "0.02 *"))
    assert protocol.run_in_folder(*options)[2].key != ledger.key  # another text is another method


def test_trials_are_drawn_alike_wherever_the_file_lies(method, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "peak.py").write_text(CODE)
    other = f"{tmp_path / 'elsewhere' / 'peak.py'}:Peak"
    assert draw("paper", method, 3, 1) == draw("paper", other, 3, 1) != draw("paper", other, 3, 2)


def test_its_own_loss_and_hyperparameters_are_used(method, digits, monkeypatch):
    recipe = replace(RECIPE, method=method, epochs=1, own=(("sharpness", 2.5),))
    network, losses = build_network(recipe, 10), []
    assert isinstance(network, Network) and network.sharpness == 2.5
    loss = type(network).loss
    monkeypatch.setattr(type(network), "loss", lambda *given: losses.append(1) or loss(*given))
    fit(recipe, digits["train"], 0, make_fabric("cpu"))
    assert len(losses) == 3


def test_a_checkpoint_does_not_answer_for_another_text(method, digits, tmp_path):
    fit(replace(RECIPE, method=method, epochs=1), digits["train"], 0, make_fabric("cpu"), tmp_path / "peak.pt")
    (tmp_path / "peak.py").write_text(CODE.replace("0.01 *", "0.02 *"))
    with pytest.raises(ValueError, match=r"peak\.pt: the file of .*peak\.py:Peak has changed since"):
        load_trained(tmp_path / "peak.pt", 10)


def test_wrong_names_are_one_clear_line(method, tmp_path):
    for name, message in (
        (f"{tmp_path}/none.py:Peak", r"none\.py: no such file of a method"),
        (method.replace("Peak", "Pique"), "has no class 'Pique' that is a subclass of wsol_eval.Network"),
        (
            "no_such_package.module:Peak",
            "No module named 'no_such_package'; expected package.module:Class or file.py:Class",
        ),
        ("json:JSONDecoder", "json has no class 'JSONDecoder' that is a subclass"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            plugin.load(name)
    with pytest.raises(ValueError, match=r"own: 'blur' is no hyperparameter of .*Peak; there are sharpness"):
        build_network(Recipe(method=method, own=(("blur", 1.0),)), 10)
    with pytest.raises(ValueError, match="pretrained: .* loads its own weights"):
        build_network(Recipe(method=method, pretrained="imagenet"), 10)
