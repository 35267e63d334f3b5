"""Tables and their settings, protocol and claims, what an attack may not see, figures and commands."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from fl_linkability import claims, experiments, studies
from fl_linkability.catalogue import tables
from fl_linkability.data.reading import Reading
from fl_linkability.evaluate import Adversary, user_resamples
from fl_linkability.experiments import Experiment, cluster_background, execute, make_mitigation
from fl_linkability.mitigations import group_sums
from fl_linkability.settings import MEASUREMENT, PRESETS, Settings
from fl_linkability.store import UpdateStore
from fl_linkability.train import make_fabric
from shared_utils.runlog import RunLog

FABRIC = make_fabric("cpu")
SMALL = replace(
    PRESETS["paper-embedded"], users=6, images_per_device=16, background=120, rounds=30, clients_per_round=4
)


@pytest.fixture(scope="module")
def small():
    return Experiment(SMALL, 0, Reading(), FABRIC)


def test_every_row_has_valid_settings():
    for table in tables():
        for scale in table.scales:
            for run in table.runs(scale):
                Settings(**run.settings)


@pytest.mark.parametrize(
    "table, row, scale, preset",
    [
        ("table-3", "Digits, random, MLP", "embedded", "paper-embedded"),
        ("table-3", "MNIST, random, MLP", "mnist", "mnist"),
        ("table-3", "FLAIR (substitute), chrono, MLP", "paper", "flair"),
        ("table-3", "FEMNIST (substitute), random, MLP", "paper", "femnist"),
        ("table-3", "FEMNIST-like, CNN, random, MLP", "femnist-like", "femnist-like"),
        ("table-3", "PIPA, photoset, MLP", "paper", "photos-full"),
        ("table-3", "PIPA, photoset, MLP", "head", "photos-head"),
        ("table-3", "Blog, random, MLP", "paper", "blog"),
        ("table-3", "Yelp, random, MLP", "paper", "yelp"),
        ("T5", "none", "embedded", "ours"),
        ("T7", "skew and style", "embedded", "ours-all-devices"),
    ],
)
def test_scales_are_the_presets(table, row, scale, preset):
    chosen = next(each for each in tables() if each.id == table)
    settings = Settings(**chosen.settings(chosen.row(row), scale))
    if preset.startswith("photos"):
        settings = replace(settings, dataset="csv")
    assert settings == PRESETS[preset]


def test_published_cells_stay_out_of_our_scales():
    for table in tables():
        for row in table.rows:
            if row.published:
                assert set(row.scales) <= {"paper", "head"}, (table.id, row.name)


# ---- protocol --------------------------------------------------------------------------------------------------


def test_one_federation_serves_many_runs(monkeypatch):
    calls = []
    original = experiments.simulate
    monkeypatch.setattr(experiments, "simulate", lambda *a, **k: calls.append(1) or original(*a, **k))
    rows = [vars(replace(SMALL, attack=attack)) for attack in ("paper-knn", "centroid")]
    outcomes = execute(rows, [0, 0], reading=Reading())
    assert len(calls) == 1 and outcomes[0].metrics["mAP_macro"] != outcomes[1].metrics["mAP_macro"]
    assert outcomes[0].details["engine"] == {"name": "batched"} and len(outcomes[0].details["users"]["ap"]) == 6
    json.dumps(outcomes[0].details, allow_nan=False)


def test_biased_users_are_found_and_unbiased_ones_are_not():
    biased = Experiment(replace(SMALL, rounds=60), 0, Reading(), FABRIC)
    outcome = biased.measure(replace(biased.settings, attack="paper-knn")).metrics
    assert outcome["times_chance_ap"] > 3.5 and outcome["above_floor"] > 0 and outcome["known_users"] == 6
    for change in ({"iid": True}, {"style": False, "skew": False}):
        settings = replace(SMALL, rounds=60, attack="paper-knn", **change)
        assert Experiment(settings, 0, Reading(), FABRIC).measure(settings).metrics["above_floor"] < 0
    permuted = biased.measure(replace(biased.settings, attack="paper-knn", control="permuted-labels")).metrics
    assert permuted["times_chance_ap"] < outcome["times_chance_ap"] - 1


def test_identity_does_not_reach_the_features(small):
    """Numbers of devices, users, counts and the order of arrival may change: the features stay what they were."""
    store = small.simulation.updates
    order = np.random.default_rng(0).permutation(len(store))
    renamed = np.random.default_rng(1).permutation(12)
    other = UpdateStore(store.layer_slices)
    columns = {name: store.column(name)[order] for name in ("round", "user", "role", "n_examples")}
    device = renamed[store.column("device")[order]]
    other.append(store.delta[order], device=device, **columns | {"n_examples": columns["n_examples"] * 0 + 7})
    for center in ("none", "leave-one-out"):
        a, b = (each.features("all", center) for each in (store, other))
        np.testing.assert_allclose(b, a[order], rtol=0, atol=1e-12)
    settings = replace(SMALL, attack="centroid")
    found = [Adversary(each, 6, 0, settings).reid()[0] for each in (store, other)]
    assert found[0]["mAP_macro"] == pytest.approx(found[1]["mAP_macro"], abs=1e-9)


@pytest.mark.parametrize("measure", sorted(set(experiments.MEASURES)))
def test_every_measure(small, measure):
    settings = replace(SMALL, measure=measure, attack="paper-siamese" if measure == "open-matching" else "paper-knn")
    if measure in ("pairs", "stage"):
        settings = replace(settings, attack={"pairs": "cosine", "stage": "centroid"}[measure])
    if measure == "stage":
        with_more = Experiment(replace(SMALL, rounds=60, clients_per_round=8), 0, Reading(), FABRIC)
        outcome = with_more.measure(replace(with_more.settings, measure="stage", attack="centroid"))
        assert np.array(outcome.details["matrix"]).shape == (5, 5)
    else:
        outcome = small.measure(settings)
    assert outcome.metrics["user_accuracy"] > 10 and all(np.isfinite(v) for v in outcome.metrics.values())


def test_learners_and_sizes(small):
    accuracy = {
        learner: small.measure(replace(SMALL, measure="utility", learner=learner)).metrics["population_accuracy"]
        for learner in ("central", "background", "k-nn", "chance")
    }
    assert accuracy["chance"] == 10 and min(accuracy["k-nn"], accuracy["background"]) > 30
    sizes = small.measure(replace(SMALL, measure="describe"))
    assert sizes.metrics["parameters"] == 8554 and sizes.metrics["examples"] == 192
    one, eight = (small.measure(replace(SMALL, measure="images", set_size=n)).metrics["mAP_macro"] for n in (1, 8))
    assert eight > one > 30
    with pytest.raises(ValueError, match="set_size: no anonymous device has 17 images"):
        small.measure(replace(SMALL, measure="images", set_size=17))


def test_secure_aggregation_hides_more_in_larger_sums(small):
    hit = {k: small.measure(replace(SMALL, measure="groups", attack="centroid", set_size=k)) for k in (1, 2)}
    assert hit[1].metrics["times_chance"] > hit[2].metrics["times_chance"]
    with pytest.raises(ValueError, match="set_size: no round has 9 anonymous updates"):
        small.measure(replace(SMALL, measure="groups", set_size=9))


@pytest.mark.parametrize("attack", ["centroid", "paper-svm", "paper-knn", "paper-mlp", "logreg"])
def test_a_sum_of_one_update_is_that_update(small, attack):
    settings = replace(SMALL, attack=attack, set_size=1)
    adversary = Adversary(small.simulation.updates, 6, 0, settings)
    assert studies.groups(adversary)[0]["hit"] == pytest.approx(adversary.reid()[0]["top1"])


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_resample_without_both_kinds_of_pairs_has_no_average_precision():
    """Three users, one of whom never answered: some resamples hold one user only, some nobody at all."""
    rng, store = np.random.default_rng(0), UpdateStore({"fc": (0, 8)})
    for number in range(6):
        for role in (0, 1):
            updates, users = rng.normal(size=(2, 8)) + 2 * np.eye(2, 8), np.arange(2)
            store.append(updates, round=number, device=2 * users + role, user=users, role=role, n_examples=1)
    drawn = (user_resamples(3, 0)[:, :2] > 0).all(1)
    adversary = Adversary(store, 3, 0, replace(SMALL, layers="all", attack="cosine"))
    for measure in (adversary.pairs, adversary.all_pairs):
        metrics, details = measure()
        replicates = np.array(details["replicates"]["matching_ap"], float)
        assert np.isfinite(metrics["matching_ap"]) and (np.isfinite(replicates) == drawn).all()


def test_sums_do_not_overlap_and_stay_within_a_round(small, monkeypatch):
    taken = []
    monkeypatch.setattr(studies, "group_sums", lambda raw, group: taken.append((raw, group)) or group_sums(raw, group))
    store = small.simulation.updates
    studies.groups(Adversary(store, 6, 0, replace(SMALL, attack="centroid", set_size=2)))
    (raw, group), everything = taken[0], store.features("fc2", normalize=False)
    rows = np.array([int(np.flatnonzero((everything == each).all(1))[0]) for each in raw])
    assert len(set(rows.tolist())) == len(rows), "no update is in two sums"
    assert (np.bincount(group) == 2).all() and (store.column("role")[rows] == 1).all()
    for number in range(group.max() + 1):
        assert len(set(store.column("round")[rows[group == number]])) == 1


def test_stages_are_known_by_row_and_probed_by_column():
    """Known updates of the first fifth are noise, and so are the probes of the last: that row and column are low."""
    rng, store = np.random.default_rng(0), UpdateStore({"fc": (0, 16)})
    centre = rng.normal(size=(8, 16))
    for number in range(50):
        for role, noisy in ((0, number < 10), (1, number >= 40)):
            updates = (0 if noisy else 3) * centre + rng.normal(size=(8, 16))
            users = np.arange(8)
            store.append(updates, round=number, device=2 * users + role, user=users, role=role, n_examples=1)
    settings = replace(SMALL, layers="all", attack="centroid")
    matrix = np.array(studies.stage(Adversary(store, 8, 0, settings))[1]["matrix"])
    assert matrix[0].max() < 4 and matrix[:, 4].max() < 4, "row: rounds of the known; column: rounds of the probes"
    assert matrix[1:, :4].min() > 7


@pytest.mark.parametrize("task, best", [("class", 90), ("number", 10)])
def test_the_background_alone_is_judged_by_its_best_epoch(monkeypatch, task, best):
    """The utility of a number is its mean absolute error: less is better."""
    values = iter([50, 90, 10])
    monkeypatch.setattr(experiments, "utility", lambda bundle, model, state: {"user": 0, "population": next(values)})
    background = SimpleNamespace(x=None, y=None)
    run = SimpleNamespace(
        bundle=SimpleNamespace(background=background, task=task),
        model=lambda: None,
        central=lambda data, epochs: [{}] * 3,
    )
    assert experiments._background_only(run)[0]["population_accuracy"] == best


def test_open_world_needs_a_seen_user(small):
    with pytest.raises(ValueError, match="re-identification needs a seen user"):
        studies.open_reid(Adversary(small.simulation.updates, 6, 0, replace(SMALL, seen=0.0)))


def test_pretraining_and_mitigations_from_settings(small):
    start = Experiment(replace(SMALL, pretrain_epochs=40, rounds=5), 0, Reading(), FABRIC)
    cold = Experiment(replace(SMALL, rounds=5), 0, Reading(), FABRIC)
    utility = [
        run.measure(replace(run.settings, measure="utility")).metrics["population_accuracy"] for run in (start, cold)
    ]
    assert utility[0] > utility[1] + 10
    for name in ("noise", "mm-aug", "calibrated", "style-jitter", "clip", "local-dp", "central-dp", "decoys+noise"):
        make_mitigation(replace(SMALL, mitigation=name, clusters=5, std=0.1), small.bundle, 0)
    outcome = execute([vars(replace(SMALL, mitigation="local-dp", attack="centroid"))], [0], reading=Reading())[0]
    assert outcome.metrics["epsilon"] > 50 and outcome.metrics["noise_relative"] > 1
    with pytest.raises(ValueError, match="clusters must lie in 1 .. 120"):
        cluster_background(small.bundle.background, 121, 0)
    with pytest.raises(ValueError, match="belong to another federation"):
        small.measure(replace(SMALL, rounds=3))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dataset": "reddit"}, "dataset must be one of digits, mnist"),
        ({"dataset": "blog"}, "model lstm goes with blog and yelp, got 'mlp' for blog"),
        ({"mitigation": "noise+nothing"}, "mitigation must be one of none, noise"),
        ({"mitigation": "decoys+noise"}, "mitigation noise: std must be above 0, got 0"),
        ({"seen": 1.5}, r"seen must lie in \[0, 1\]"),
        ({"set_size": 0}, "set_size must be at least 1"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(ValueError, match=message):
        Settings(**change)


def test_measurement_settings_are_fields():
    assert set(MEASUREMENT) <= set(vars(Settings()))


# ---- claims ----------------------------------------------------------------------------------------------------


def test_bootstrap_is_the_definition(small):
    outcome = small.measure(replace(SMALL, attack="centroid"))
    record = {"metrics": outcome.metrics, "details": outcome.details, "seed": 0}
    counts = user_resamples(6, 0)
    assert (counts.sum(1) == 6).all() and len(counts) == 200
    ap = np.array(outcome.details["users"]["ap"])
    value, draws = claims.replicates(record, "mAP_macro")
    slow = [100 * np.mean(np.repeat(ap, count)) for count in counts]
    assert value == outcome.metrics["mAP_macro"] and np.allclose(draws, slow)
    top1, n = (np.array(outcome.details["users"][name]) for name in ("top1", "probes"))
    slow = [100 * np.sum(c * top1 * n) / np.sum(c * n) for c in counts]
    assert np.allclose(claims.replicates(record, "top1")[1], slow)
    for name in claims.FROM_USERS:  # without resampling each is the metric itself
        if name in outcome.metrics and name in ("mAP_macro", "times_chance_ap", "top1", "log2_top1", "above_floor"):
            users = [np.array(outcome.details["users"][each], float) for each in claims.FROM_USERS[name][0]]
            once = claims.FROM_USERS[name][1](outcome.metrics, np.ones((1, 6)), *users)
            assert once[0] == pytest.approx(outcome.metrics[name], rel=1e-2, abs=2e-2)
    assert claims.replicates(record, "population_accuracy") is None


def test_verdicts(tmp_path):
    table = next(each for each in tables() if each.id == "T7")
    log = RunLog(tmp_path / "log.jsonl")
    rng = np.random.default_rng(0)
    for run in table.runs("embedded", seeds=(20, 21, 22)):
        ap = rng.uniform(0.02, 0.06, 40) if run.row in ("neither (no bias)", "permuted labels") else np.full(40, 0.9)
        metrics = {name: 1.0 for name in table.metrics}
        times = float(ap.mean() * 40)
        metrics |= {"floor_q99": 5.0, "times_chance_ap": times, "above_floor": times - 5.0, "known_users": 40}
        users = {"ap": ap.tolist(), "top1": ap.tolist(), "probes": [10] * 40}
        record = {
            "table": run.table,
            "row": run.row,
            "scale": run.scale,
            "seed": run.seed,
            "settings_hash": run.key[-1],
        }
        log.append(record | {"metrics": metrics, "details": {"users": users}, "settings": run.settings})
    verdicts = {v.claim.text: v for v in claims.judge(table, "embedded", log)}
    assert verdicts["Without skew and style the attack is at the permuted-device floor"].verdict == "holds"
    assert verdicts["Under IID replacement, too, the attack is at the permuted-device floor"].verdict == "fails"
    assert verdicts["Skew alone gives more than 10 times chance (top-1)"].verdict == "holds"
    assert {v.verdict for v in claims.judge(table, "embedded", RunLog(tmp_path / "none.jsonl"))} == {"not measured"}
