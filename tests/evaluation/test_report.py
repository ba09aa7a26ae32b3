"""The report says what the numbers say, stands alone, and has exactly the keys it promises."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.evaluation import figures
from trainer.evaluation.report import KEYS, Entry, accuracy_noise, headline, write_report

MEASURES = dict(zip(KEYS, (41.2, 50.0, 0.56, 0.55, 0.57, 0.99, 0.80, 27.8, 0.85), strict=True))
BETTER = MEASURES | {"knn": 43.1, "gamma": 0.13, "unexplained": 0.87, "hue_r2": 0.86}


class Reader(HTMLParser):
    """Sees that every element that opens is closed in order, and collects what is loaded from elsewhere."""

    VOID = frozenset({"meta", "link", "img", "br", "path", "use", "rect"})

    def __init__(self):
        super().__init__()
        self.open, self.loaded, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.loaded += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def entry(folder, model, measures, objective):
    """A run and its evaluation, as training and `evaluate` leave them."""
    run, evaluation = folder / model, folder / model / "evaluation"
    evaluation.mkdir(parents=True)
    (run / "settings.json").write_text(
        json.dumps({"seed": 3, "out": model, "data": {"batch_size": 64}, "objective": objective})
    )
    rows = [
        {"kind": "train", "step": s, "epoch": s / 10, "loss": 5 / s, "terms/contrastive": 4 / s, "effective_rank": 9.0}
        for s in range(1, 300)
    ]
    rows += [{"kind": "validation", "step": 299, "knn": 1.0}, rows[-1] | {"terms/contrastive": 0.25}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {
        "measures": measures,
        "notes": ["<careful> & sober"],
        "definitions": {name: f"what {name} is" for name in measures},
        "split": "test",
        "images": {"train": 9000, "test": 2000, "geometry": 2000},
        "draws": 2,
        "checkpoint": {"folder": "x", "step": 300},
        "code": {"version": "0", "git_commit": "", "torch": "2"},
    }
    (evaluation / "metrics.json").write_text(json.dumps(result))
    counts = np.random.default_rng(0).integers(1, 9, (2, figures.BINS)).tolist()
    (evaluation / "draws.json").write_text(json.dumps({"per_draw": {}, "cosines": counts}))
    Image.new("RGB", (8, 8)).save(evaluation / "views.png")
    return Entry(run, evaluation)


def make(folder, simclr=MEASURES, care=BETTER):
    base = {"name": "simclr", "temperature": 0.5}
    entries = {
        "simclr": entry(folder, "simclr", simclr, base),
        "care": entry(folder, "care", care, {"name": "care", "weight": 10.0, "groups": 16, "base": base}),
    }
    write_report(entries, folder / "out", seconds=432.5, choice="On the validation split.\n\nNever on the <test> split.")
    return (folder / "out" / "report.html").read_text()


def test_the_json_has_exactly_the_promised_keys(tmp_path):
    make(tmp_path)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == {"simclr": MEASURES, "care": BETTER, "seconds": 432.5}


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(tmp_path):
    page = make(tmp_path)
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert all(place.startswith(("data:", "#")) for place in reader.loaded)
    assert not re.search(r"https?:|//[a-z]|@import|\burl\((?!#)", re.sub(r"data:image/png;base64,[^\"]*", "", page))
    assert "$" not in page
    assert Image.open(tmp_path / "out" / "result.png").size[0] > 1000


def test_the_page_lists_the_settings_that_differ_and_hides_nothing_it_was_told(tmp_path):
    page = make(tmp_path)
    told = ("&lt;careful&gt; &amp; sober", "Never on the &lt;test&gt; split.", "7 min 12 s")
    for shown in ("objective.weight", "objective.groups", *told):
        assert shown in page
    for hidden in ("objective.temperature", "objective.base", "<code>out</code>"):
        assert hidden not in page


def test_colours_of_the_figures_are_the_pages(tmp_path):
    svg = figures.to_svg(figures.curves({"care": ([0, 1], [2, 3])}, "epoch", "nats"), "loss")
    assert "var(--care)" in svg
    assert not re.search("|".join(figures.COLOURS.values()), svg)


def test_a_run_without_labels_still_makes_a_report(tmp_path):
    bare = {key: value for key, value in MEASURES.items() if key not in ("knn", "linear", "hue_r2")}
    make(tmp_path, bare, bare)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["care"]["knn"] is None


@pytest.mark.parametrize(
    ("care", "says", "does_not_say"),
    [
        (BETTER, ["6.2 times lower", "no difference"], ["points more"]),
        (BETTER | {"knn": 51.2}, ["10.0 points more"], ["no difference"]),
        (BETTER | {"knn": 31.2}, ["10.0 points less"], ["points more"]),
        (BETTER | {"gamma": 0.9}, ["does not lower γ"], ["times lower"]),
        (BETTER | {"gamma": 0.0}, ["times lower"], ["nan", "inf"]),
    ],
)
def test_the_headline_claims_what_the_numbers_show(care, says, does_not_say):
    sentence = headline(MEASURES, care, tested=2000)
    assert all(part in sentence for part in says)
    assert not any(part in sentence for part in does_not_say)


def test_accuracy_noise_is_the_spread_of_simulated_test_sets():
    hits = np.random.default_rng(0).binomial(2000, [0.4, 0.45], size=(20000, 2)) / 20
    assert accuracy_noise(40, 45, 2000) == pytest.approx(2 * np.std(hits[:, 0] - hits[:, 1]), rel=0.03)


def test_the_view_sheet_shows_each_pixel_where_it_belongs():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = torch.randint(256, (3, 6, 3, 64, 64)).float() / 255
    normalised = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    sheet = np.asarray(figures.view_sheet(normalised[0], normalised[1:], 2, mean, std))
    side, gap = 64, 4
    for image in range(6):
        for column in range(3):
            block, row = divmod(image, 3)
            left, top = block * (3 * (side + gap) + 3 * gap) + column * (side + gap), row * (side + gap)
            cell = sheet[top : top + side, left : left + side, :3]
            np.testing.assert_array_equal(cell, (255 * pixels[column, image]).round().byte().permute(1, 2, 0).numpy())
