"""The report of two runs, SimCLR and CARE, side by side: one HTML file that needs nothing else, and its numbers as JSON."""

import base64
import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from trainer.checkpoint import write_json
from trainer.config import Run, flatten
from trainer.evaluation import figures
from trainer.evaluation.evaluate import DEFINITIONS, DRAWS, METRICS
from trainer.evaluation.figures import NAMES
from trainer.tracking import read_metrics

KEYS = ("knn", "linear", "wahba_so", "wahba_o", "l_inv", "unexplained", "gamma", "effective_rank", "hue_r2")
TABLE = {  # measure -> its name, and where the better values lie; neither for what is no merit by itself
    "knn": ("kNN accuracy", "↑"),
    "linear": ("Linear probe", "↑"),
    "gamma": ("γ, relative rotational equivariance error", "↓"),
    "unexplained": ("Unexplained share W / L", "↓"),
    "wahba_so": ("Wahba error W over rotations", ""),
    "wahba_o": ("Wahba error over rotations and reflections", ""),
    "l_inv": ("Displacement L", ""),
    "effective_rank": ("Effective rank", "↑"),
    "hue_r2": ("Recovered: hue", "↑"),
}
CURVES = {  # key of a record -> title and unit
    "terms/contrastive": ("Contrastive loss", "nats"),
    "terms/equivariance": ("Equivariance term", "mean squared change"),
    "effective_rank": ("Effective rank in training", "dimensions"),
}
SHARED = ("model.backbone", "data.size", "data.batch_size", "schedule.epochs", "optimiser.name", "optimiser.lr", "seed")
MARGIN = 0.02  # below which two values that are no accuracies count as equal
POINTS = 120  # of a curve: it shows means over as many equal stretches of the run


@dataclass(frozen=True)
class Entry:
    """One run of the report.

    Args:
        run: its folder, with metrics.jsonl and settings.json.
        evaluation: the folder that `evaluate` wrote.
    """

    run: Path
    evaluation: Path


def write_report(entries: Mapping[str, Entry], out: Path, seconds: float, choice: str = "") -> None:
    """Write report.html, report.json and result.png into `out`.

    Args:
        entries: "simclr" and "care".
        out: folder to write into.
        seconds: how long everything took.
        choice: how the settings were chosen, plain text.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = {model: json.loads((entry.evaluation / METRICS).read_text()) for model, entry in entries.items()}
    measures = {model: result["measures"] for model, result in results.items()}
    numbers = {model: {key: values.get(key) for key in KEYS} for model, values in measures.items()}
    write_json(out / "report.json", numbers | {"seconds": seconds})
    figures.save_png(figures.result_bars(measures), out / "result.png")
    page = Template((Path(__file__).parent / "report.html").read_text()).substitute(
        headline=html.escape(headline(measures["simclr"], measures["care"], _tested(results))),
        table=_table(measures, results),
        notes=_notes(results),
        angles=figures.to_svg(figures.angle_histogram(_cosines(entries)), "Histogram of the angles"),
        draws=results["care"]["draws"],
        curves=_curves(entries),
        views=_views(entries),
        choice=_paragraphs(choice),
        settings=_settings(entries),
        facts=_facts(results["care"], seconds),
    )
    unfinished = out / ".report.html.unfinished"
    unfinished.write_text(page)
    unfinished.replace(out / "report.html")


def headline(simclr: Mapping[str, float], care: Mapping[str, float], tested: int) -> str:
    """The result in two sentences, each of which follows from the numbers.

    Args:
        simclr, care: measures.
        tested: images behind the kNN accuracy.
    """
    before, after = simclr["gamma"], care["gamma"]
    if after < before:
        gamma = (
            f"With CARE, γ is {before / max(after, 1e-12):.1f} times lower than with SimCLR ({after:.2f} against {before:.2f})"
        )
    else:
        gamma = f"CARE does not lower γ ({after:.2f} against SimCLR's {before:.2f})"
    share = (
        f"rotations leave {care['unexplained']:.0%} of the displacement unexplained, with SimCLR {simclr['unexplained']:.0%}"
    )
    if "knn" not in simclr or "knn" not in care:
        return f"{gamma}; {share}."
    difference, noise = care["knn"] - simclr["knn"], accuracy_noise(simclr["knn"], care["knn"], tested)
    if abs(difference) <= noise:
        verdict = f"no difference that {tested:,} images can show"
    else:
        verdict = f"{abs(difference):.1f} points {'more' if difference > 0 else 'less'}"
    return f"{gamma}; {share}. kNN accuracy is {care['knn']:.1f}\xa0% against {simclr['knn']:.1f}\xa0%: {verdict}."


def accuracy_noise(first: float, second: float, tested: int) -> float:
    """Two standard errors of the difference of two accuracies on `tested` images, in points, as if independent."""
    variance = sum(p / 100 * (1 - p / 100) for p in (first, second)) / tested
    return 200 * math.sqrt(variance)


def _tested(results: Mapping[str, Any]) -> int:
    result = results["care"]
    tested: int = result["images"][result["split"]]
    return tested


def _table(measures: Mapping[str, Mapping[str, float]], results: Mapping[str, Any]) -> str:
    """Rows of the table, the better value marked where there is a better one."""
    definitions = results["care"]["definitions"]
    factors = {name: (f"Recovered: {name.removesuffix('_r2')}", "↑") for name in definitions if name.endswith("_r2")}
    rows = []
    for key, (name, better) in ({k: v for k, v in TABLE.items() if k not in factors} | factors).items():
        values = [measures[model].get(key) for model in NAMES]
        best = _better(key, values, better, _tested(results))
        cells = "".join(
            f'<td class="{model}{" best" if i == best else ""}">{_number(key, value)}</td>'
            for i, (model, value) in enumerate(zip(NAMES, values, strict=True))
        )
        about = html.escape(definitions.get(key, DEFINITIONS.get(key, "")))
        rows.append(f'<tr><th scope="row">{name} <i>{better}</i><small>{about}</small></th>{cells}</tr>')
    return "\n".join(rows)


def _better(key: str, values: list[float | None], better: str, tested: int) -> int | None:
    """Which of two values is better; None where neither is, as far as the images can tell."""
    first, second = values
    if not better or first is None or second is None:
        return None
    margin = accuracy_noise(first, second, tested) if key in ("knn", "linear") else MARGIN
    if abs(first - second) <= margin:
        return None
    return int((second > first) == (better == "↑"))


def _number(key: str, value: float | None) -> str:
    if value is None:
        return "–"
    if key in ("knn", "linear"):
        return f"{value:.1f}&nbsp;%"
    return f"{value:.1f}" if key == "effective_rank" else f"{value:.3f}".replace("-", "−")


def _notes(results: Mapping[str, Any]) -> str:
    """What limits the numbers."""
    care, tested = results["care"], _tested(results)
    geometry = f"Geometry: {care['images']['geometry']:,} of them, {care['draws']} transformations."
    notes = [f"Measured on {tested:,} {care['split']} images that neither run has seen. {geometry}"]
    values = [results[model]["measures"].get("knn") for model in NAMES]
    if None not in values:
        noise = accuracy_noise(values[0], values[1], tested)
        notes.append(f"Accuracies that differ by less than {noise:.1f} points are no difference on this many images.")
    notes.append("One run of each: how much the numbers vary over seeds is not measured here.")
    notes += [f"{NAMES[model]}: {note}" for model in NAMES for note in results[model]["notes"]]
    return "".join(f"<li>{html.escape(note)}</li>" for note in notes)


def _cosines(entries: Mapping[str, Entry]) -> dict[str, list[list[int]]]:
    return {model: json.loads((entries[model].evaluation / DRAWS).read_text())["cosines"] for model in NAMES}


def _curves(entries: Mapping[str, Entry]) -> str:
    """A figure for every recorded term and for the effective rank, both runs in it where both record it."""
    runs = {model: read_metrics(entries[model].run / "metrics.jsonl") for model in NAMES}
    runs = {model: [record for record in records if record["kind"] == "train"] for model, records in runs.items()}
    recorded = dict.fromkeys(key for records in runs.values() for record in records for key in record)
    parts = []
    for key in recorded:
        title, unit = CURVES.get(key, (key.removeprefix("terms/").title(), ""))
        if key.startswith("terms/") or key in CURVES:
            lines = {model: _line(records, key) for model, records in runs.items() if any(key in r for r in records)}
            figure = figures.to_svg(figures.curves(lines, "epoch" if "epoch" in recorded else "step", unit), title)
            parts.append(f"<figure><figcaption>{html.escape(title)}</figcaption>{figure}</figure>")
    return "\n".join(parts)


def _line(records: list[dict[str, Any]], key: str) -> tuple[list[float], list[float]]:
    points = np.array([(r.get("epoch", r["step"]), r[key]) for r in records if key in r])
    stretches = np.array_split(points, min(POINTS, len(points)))
    x, y = ([float(part[:, i].mean()) for part in stretches] for i in (0, 1))
    return x, y


def _views(entries: Mapping[str, Entry]) -> str:
    """What each run looks at, and whether its draws are shared."""
    parts = []
    for model in NAMES:
        groups = _run_settings(entries[model]).get("objective.groups")
        shared = "one pair of transformations a group: the same crop, flip and colour change down a column"
        about = shared if groups else "transformations drawn for every image"
        picture = base64.b64encode((entries[model].evaluation / "views.png").read_bytes()).decode()
        image = f'<img alt="Images and their two views, {NAMES[model]}" src="data:image/png;base64,{picture}">'
        parts.append(f"<figure><figcaption><b>{NAMES[model]}</b>: {about}</figcaption>{image}</figure>")
    return "\n".join(parts)


def _settings(entries: Mapping[str, Entry]) -> str:
    """Rows of the settings in which the two runs differ, and one of those that they share."""
    simclr, care = (_run_settings(entries[model]) for model in NAMES)
    free = tuple(f"{name}." for name in Run.free)
    keys = [key for key in sorted(simclr | care) if simclr.get(key) != care.get(key) and not f"{key}.".startswith(free)]
    cells = [(key, *(html.escape(str(side.get(key, "–"))) for side in (simclr, care))) for key in keys]
    rows = [f'<tr><th scope="row"><code>{key}</code></th><td>{a}</td><td>{b}</td></tr>' for key, a, b in cells]
    for key in SHARED:
        if key in care and simclr.get(key) == care[key]:
            rows.append(f'<tr class="shared"><th scope="row"><code>{key}</code></th><td colspan="2">{care[key]}</td></tr>')
    return "\n".join(rows)


def _run_settings(entry: Entry) -> dict[str, Any]:
    """Flat settings, those of CARE's base under the names that they have without CARE."""
    settings = flatten(json.loads((entry.run / "settings.json").read_text()))
    base = {key.replace(".base.", "."): settings.pop(key) for key in list(settings) if key.startswith("objective.base.")}
    return base | settings


def _facts(result: Mapping[str, Any], seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    commit = result["code"]["git_commit"][:12]
    version = f"CARE Trainer {result['code']['version']}" + (f" at {commit}" if commit else "")
    return html.escape(f"Made in {minutes} min {rest} s by {version}, torch {result['code']['torch']}.")


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{html.escape(part)}</p>" for part in text.strip().split("\n\n") if part)
