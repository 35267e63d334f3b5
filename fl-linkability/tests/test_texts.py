"""Blogs and reviews as they are released, their word numbers, and the LSTM: a plain loop's update by every engine."""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fl_linkability import cli
from fl_linkability.data.bundle import NOTHING, Background
from fl_linkability.data.reading import Reading
from fl_linkability.data.texts import (
    UNKNOWN,
    Text,
    next_words,
    read_blog,
    read_blogs,
    read_yelp,
    sentences,
    tokens,
    vocabulary,
    with_stars,
    word_vectors,
)
from fl_linkability.engines import simulate
from fl_linkability.evaluate import utility
from fl_linkability.experiments import Experiment, cluster_background
from fl_linkability.federation import FedAvgConfig
from fl_linkability.models import TextLSTM
from fl_linkability.needs import needs
from fl_linkability.settings import PRESETS
from fl_linkability.tiny import write_tiny
from fl_linkability.train import LocalSGD, epoch_orders, losses, make_fabric, train_one, trained_state

FABRIC = make_fabric("cpu")
TINY = {"images_per_device": 3, "rounds": 2, "clients_per_round": 6, "length": 6, "hidden": 5, "embedding": 4}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_tiny(root)
    return root


def experiment(archives, name, **changes):
    return Experiment(replace(PRESETS[name], **TINY | {"clusters": 3} | changes), 0, Reading(archives), FABRIC)


# ---- the released layouts ------------------------------------------------------------------------------------


def post(date, text):
    return f"<date>{date}</date>\n<post>\n\n\t {text}\n\n    \n</post>\n\n\n"


def test_a_blog_is_no_xml(tmp_path):
    path = tmp_path / "1.male.15.Student.Leo.xml"
    said = "I <3 Q&A, caf\xe9s &nbsp; &amp; &unheard; \x0b tea\x00!  It's\nfine"
    for encoding in ("latin-1", "utf-8", "utf-8-sig"):
        path.write_bytes(f"<Blog>\n\n{post('1,May,2004', said)}</Blog>".encode(encoding))
        (only,) = read_blog(path)
        assert "I <3 Q&A, caf\xe9s" in only and "& &unheard;" in only
        assert sentences(only) == [only.split("\n")[2].strip().removesuffix("It's").strip()]  # one word: no next one
    path.write_bytes(b"<Blog><date>1,May,2004</date><post>never closed<date>2,May,2004</date><post>cut off \x80 here")
    assert [" ".join(each.split()) for each in read_blog(path)] == ["never closed", "cut off € here"]


def test_posts_are_in_the_order_of_their_dates(tmp_path):
    """Files run backwards in time; months are English, or of any language, or there is no date at all."""
    dates = ["02,August,2004", "31,May,2004", ",,", "11,mai,2004", "30,May,2004", "9,December,2003", "99,May,2004"]
    path = tmp_path / "1.xml"
    path.write_text("".join(post(date, f"text {number}") for number, date in enumerate(dates)))
    assert [each.split()[1] for each in read_blog(path)] == ["5", "6", "4", "1", "2", "3", "0"]


def test_bloggers_with_enough_posts(tmp_path):
    for user, n in (("7", 3), ("8", 5), ("9", 4)):
        (tmp_path / "blogs").mkdir(exist_ok=True)
        content = "".join(post("1,May,2004", f"post {i} of mine. And more of it") for i in range(n))
        (tmp_path / "blogs" / f"{user}.male.15.Student.Leo.xml").write_text(content)
    (tmp_path / "blogs" / "._8.male.15.Student.Leo.xml").write_bytes(b"\x00")
    texts = read_blogs(tmp_path, 2, 1)
    assert {each.user for each in texts} == {"8", "9"} and len(texts) == 2 * (5 + 4)
    assert {each.user for each in read_blogs(tmp_path, 0, 1)} == {"7", "8", "9"}
    with pytest.raises(ValueError, match="1 users have 5 posts or more, 2 are needed"):
        read_blogs(tmp_path, 0, 2)
    with pytest.raises(FileNotFoundError, match="blogs: no blogs; see `fl-linkability data`"):
        read_blogs(tmp_path / "none", 0, 1)


def test_reviews_by_date_of_users_with_enough(tmp_path):
    path = tmp_path / "yelp_academic_dataset_review.json"
    made = [("ü", "2012-01-01 10:00:00", "third"), ("b", "2011-01-01", "other"), ("ü", "2010-05-01", "first")]
    made += [
        ("ü", "2011-12-31 23:59:59", "second"),
        ("b", "2010-01-01", "x"),
        ("b", "2013-01-01", "y"),
        ("c", "2010-01-01", "z"),
    ]
    lines = [json.dumps({"user_id": u, "date": d, "text": t, "stars": 4.0, "business_id": "x"}) for u, d, t in made]
    path.write_text("\n".join([lines[0], "", *lines[1:], ""]))
    texts = read_yelp(tmp_path, 0, 1)
    assert [each.text for each in texts] == ["x", "other", "y", "first", "second", "third"]
    assert texts[-1] == Text("ü", "third", 4.0)
    for broken, reason in (
        ('{"user_id": "b", "te', "Unterminated"),
        ('{"date": "2010-01-01"}', "no 'user_id'"),
        ('{"user_id": "b", "date": "2010", "stars": 1}', "no 'text'"),
        ("[1]", "list indices"),
    ):
        path.write_text("\n".join([*lines, broken]))
        with pytest.raises(ValueError, match=f"review.json line 8: not a review .{reason}.*fetch the file again"):
            read_yelp(tmp_path, 0, 1)
    with pytest.raises(FileNotFoundError, match="Yelp's reviews are missing"):
        read_yelp(tmp_path / "none", 0, 1)


# ---- word numbers --------------------------------------------------------------------------------------------


def test_words_become_numbers():
    number = vocabulary(["b a a", "a c b d"], 4)
    assert number == {"a": 2, "b": 3}, "two of four are padding and unknown words"
    assert vocabulary(["d c"], 3) == {"c": 2}, "ties by spelling"
    assert tokens(["A, b! z", "", "b b b b b"], number, 4).tolist() == [[2, 3, UNKNOWN, 0], [0] * 4, [3] * 4]
    x, y = next_words([Text("u", "a b z a"), Text("u", "b a")], number, 3)
    assert x.tolist() == [[2, 3, UNKNOWN], [3, 2, 0]], "the last word is asked for alone"
    assert y.tolist() == [[3, NOTHING, 2], [2, NOTHING, NOTHING]], "unknown words are not predicted"
    x, y = with_stars([Text("u", "a z", 4.0)], number, 3)
    assert x.tolist() == [[2, UNKNOWN, 0]] and y.tolist() == [4.0] and y.dtype == torch.float32


def test_texts_on_the_same_words_are_one_mode():
    x = torch.tensor([[2, 3, 2, 0], [5, 6, 5, 6], [3, 2, 0, 0], [6, 5, 0, 0]])
    found = cluster_background(Background(x, torch.zeros(4)), 2, 0)
    assert found[0] == found[2] != found[1] == found[3]
    assert word_vectors(x.numpy(), 0).shape[0] == 4


# ---- the network and its update --------------------------------------------------------------------------------


@pytest.mark.parametrize("next_word", [True, False])
def test_the_lstm_is_torch_s(next_word):
    torch.manual_seed(0)
    model, theirs = TextLSTM(9, 4, 5, next_word), nn.LSTM(4, 5, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(model.lstm.weight_ih)
        theirs.weight_hh_l0.copy_(model.lstm.weight_hh)
        theirs.bias_ih_l0.copy_(model.lstm.bias)
        theirs.bias_hh_l0.zero_()
    x = torch.tensor([[2, 3, 4, 5, 0, 0], [8, 1, 2, 3, 4, 5]])
    states = theirs(model.embedding(x))[0]
    found = model(x)
    if next_word:
        assert found.shape == (2, 6, 9)
        torch.testing.assert_close(found[1], model.fc(states[1]))
        torch.testing.assert_close(found[0, :4], model.fc(states[0, :4]))
    else:  # the state behind the last word, whatever the padding
        torch.testing.assert_close(found, model.fc(torch.stack([states[0, 3], states[1, 5]])).squeeze(1))
        torch.testing.assert_close(model(x[:1, :4]), found[:1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), found), "float32 also under autocast"


def test_losses_of_words_and_numbers():
    y = torch.tensor([[2, 3, NOTHING], [NOTHING, NOTHING, NOTHING]])
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.cross_entropy(logits[0, :2], y[0, :2])
    torch.testing.assert_close(losses(logits, y), torch.stack([expected, torch.tensor(0.0)]))
    assert losses(torch.tensor([1.0, 4.0]), torch.tensor([3.0, 4.0])).tolist() == [4.0, 0.0]


@pytest.mark.parametrize("name", ["blog", "yelp"])
def test_a_client_s_update_is_the_plain_loop_s(archives, name):
    run = experiment(archives, name)
    x, y = run.bundle.users.of_device(1)
    model, local = run.model(), LocalSGD(2, 4, 0.3)
    order = epoch_orders(len(x), 2, np.random.default_rng(0))
    start = trained_state(model)
    found, _ = train_one(model, start, x, y, order, local)
    plain = run.model()
    for rows in (part for epoch in torch.from_numpy(order) for part in epoch.split(4)):
        plain.zero_grad()
        each = [
            nn.functional.cross_entropy(plain(x[row : row + 1])[0][y[row] > 0], y[row][y[row] > 0])
            if name == "blog"
            else (plain(x[row : row + 1])[0] - y[row]) ** 2
            for row in rows.tolist()
        ]
        torch.stack(each).mean().backward()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= 0.3 * parameter.grad
    expected = torch.cat([(p - start[n]).flatten() for n, p in plain.named_parameters()])
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-5)
    assert found.norm() > 0.05


@pytest.mark.parametrize("name", ["blog", "yelp"])
def test_the_engines_agree(archives, name):
    run = experiment(archives, name)
    config = FedAvgConfig(2, 5, LocalSGD(1, 4, 0.2))
    made = [simulate(run.bundle, run.model, config, engine=e) for e in ("loop", "batched", "flower-inprocess")]
    for result in made:
        np.testing.assert_allclose(result.updates.delta, made[0].updates.delta, rtol=0, atol=1e-5)
        assert result.faults == [] and np.linalg.norm(result.updates.delta, axis=1).min() > 0.01


# ---- end to end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["blog", "yelp"])
def test_a_federation_of_texts(archives, name):
    run = experiment(archives, name, mitigation="mm-aug", ratio=0.5)
    bundle, words = run.bundle, name == "blog"
    assert bundle.users.n_users == 10 and bundle.task == ("words" if words else "number")
    assert (bundle.users.y.shape[1:] == bundle.users.x.shape[1:]) == words and len(bundle.background.x) == 40
    outcome = run.measure(replace(run.settings, attack="centroid"))
    assert list(run.simulation.updates.layer_slices)[0].startswith(run.settings.layers)
    assert outcome.metrics["known_users"] > 2 and outcome.caveats == [
        f"{bundle.users.n_users} of the paper's {55 if words else 118} users"
    ]
    assert len(outcome.details["users"]["user_accuracy"]) == bundle.users.n_users
    chance = run.measure(replace(run.settings, measure="utility", learner="chance")).metrics["user_accuracy"]
    assert chance == pytest.approx(500 / bundle.n_classes) if words else 1 < chance < 2
    for refused in ({"measure": "utility", "learner": "k-nn"}, {"measure": "images"}):
        with pytest.raises(ValueError, match=f"compares images, but {name} has texts"):
            run.measure(replace(run.settings, **refused))


def test_utility_of_words_and_numbers(archives):
    """Five tries for each word that is asked for; the mean absolute error of the stars."""
    for name in ("blog", "yelp"):
        run = experiment(archives, name)
        model, (x, y, user) = run.model(), run.bundle.user_test
        found = utility(run.bundle, model, trained_state(model))
        outputs = model(x).detach()
        if name == "blog":
            asked = y > 0
            good = torch.stack([(outputs.topk(5, 2).indices[..., k] == y) & asked for k in range(5)]).any(0)
            expected, mine = 100 * good[asked].double().mean(), asked & (user == 3)[:, None]
            by_user = 100 * good[mine].double().mean()
        else:
            error = (outputs - y).abs().double()
            expected, by_user = error.mean(), error[user == 3].mean()
        assert found["user"] == found["population"] == pytest.approx(float(expected))
        assert found["by_user"][3] == pytest.approx(float(by_user))


def test_a_blog_s_older_half_is_the_prior_one(tmp_path):
    """Words that occur once are numbered by spelling, here by time; the files run backwards."""
    (tmp_path / "blog/blogs").mkdir(parents=True)
    for user in "ab":
        posts = [post(f"{day},May,2004", f"{user}{day} too") for day in range(31, 11, -1)]
        (tmp_path / f"blog/blogs/{user}.male.15.Student.Leo.xml").write_text("".join(posts))
    bundle = experiment(tmp_path, "blog", shard="chrono").bundle
    users = bundle.users
    assert (bundle.user_test[0][:, 0] == UNKNOWN).all(), "held-out sentences have no part in the vocabulary"
    first, second = (users.of_device(device)[0][:, 0] for device in (2, 3))
    assert len(first) == len(second) > 7 and first.max() < second.min()


def test_what_is_missing_is_told(archives, tmp_path, monkeypatch, capsys):
    shutil.copytree(archives / "blog", tmp_path / "blog")
    settings = replace(PRESETS["blog"], mitigation="mm-aug")
    assert all(need.met for need in needs(settings, Reading(tmp_path)))
    (tmp_path / "blog/background.txt").unlink()
    assert [need.met for need in needs(settings, Reading(tmp_path))] == [True, False]
    assert all(need.met for need in needs(PRESETS["blog"], Reading(tmp_path)))
    run = Experiment(replace(settings, **TINY), 0, Reading(tmp_path), FABRIC)
    with pytest.raises(ValueError, match="clusters must lie in 1 .. 0|the background is empty"):
        run.mitigation  # noqa: B018
    monkeypatch.setattr(sys, "argv", ["fl-linkability", "data", "verify", "--data-root", str(archives)])
    cli.main()
    told = capsys.readouterr().out
    assert "Blog Authorship Corpus: 122 images or texts" in told and "Yelp Open Dataset: 123" in told
    monkeypatch.setattr(sys, "argv", ["fl-linkability", "data", "verify", "--data-root", str(tmp_path / "elsewhere")])
    with pytest.raises(SystemExit):
        cli.main()
    assert "elsewhere: none of the data sets is here" in capsys.readouterr().err
