"""The evaluation of one checkpoint on held-out images: every measure, its figures, one metrics.json."""

import dataclasses
import difflib
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer import __version__
from trainer.checkpoint import load_objective, read_manifest, resolve, write_json
from trainer.config import Run
from trainer.data.loader import Loader
from trainer.data.shards import ShardFolder
from trainer.data.views import ViewSpec
from trainer.errors import UserError
from trainer.evaluation import figures
from trainer.evaluation.features import Features, extract
from trainer.evaluation.geometry import cosines, effective_rank, measure_motion, recovery, unexplained
from trainer.evaluation.knn import knn_accuracy
from trainer.evaluation.linear import LIGHT, linear_probe
from trainer.evaluation.robustness import TRANSFORMATIONS, centre, transformed
from trainer.objectives.objective import Objective
from trainer.tracking import add_to_run, git_commit

METRICS, DRAWS = "metrics.json", "draws.json"
DEFINITIONS = {
    "knn": "Accuracy of the 20 nearest training images voting by similarity, per cent.",
    "linear": "Accuracy of a linear classifier on the frozen features, per cent.",
    "wahba_so": "W: what is left of the displacement, root mean square, after the best rotation for each transformation.",
    "wahba_o": "The same, reflections allowed.",
    "l_inv": "L: how far a transformation moves an embedding, root mean square on the unit sphere; 0 is invariance.",
    "unexplained": "W / L: share of the displacement that no rotation explains; 1 means rotations explain nothing.",
    "gamma": "Change of the distances between embeddings under a transformation, relative to how far it moves them.",
    "effective_rank": "Dimensions that the embedding uses.",
    "angle_std": "Spread over images of the cosine by which one transformation turns them.",
}
CIRCULAR = {"hue"}  # factors in turns of a whole circle: recovered as a point on it
UNSEEN = {"orientation": ("circle", "ring")}  # factor -> classes on which it cannot be seen
BLOCKS, ROWS = 3, 4  # of the sheet of views
MOVED_BATCH = 64  # images at a time where every image comes with all draws


def evaluate(
    checkpoint: Path | str,
    shards: Path | str,
    out: Path | str,
    *,
    split: str = "test",
    images: int = 2000,
    draws: int = 20,
    parts: Sequence[str] = ("full",),
    under: Sequence[str] = (),
    passes: int = 4,
    batch_size: int = 256,
    seed: int = 0,
    device: str = "",
) -> dict[str, Any]:
    """Measure a checkpoint and write metrics.json, draws.json, angles.png and views.png into `out`.

    Args:
        checkpoint: a checkpoint or a run folder.
        shards: the data set's folder, with train/ and the split inside; train/ teaches kNN, probe and factor regression.
        out: folder to write into.
        split: "test" for a result; "val" to choose settings by.
        images: held-out images that the geometry is measured on, at most; it needs many times the embedding's dimension.
        draws: transformations, each applied to all of these images.
        parts: of the representation, that kNN, probe and factor regression read, each in turn. "full" is all of it; CLeVER has
            "invariant" and "equivariant", a ViT "last4". Measures of parts carry their names: `knn_invariant`.
        under: transformations of the held-out images that kNN and probe are tested under as well, see `robustness.py`: measures
            such as `linear_rotation90_jitter`.
        passes: light augmentations of the training images that the linear probe sees.
        batch_size: images encoded at a time.
        seed: of draws, augmentations and the probe.
        device: "cpu" or "cuda"; empty: cuda where there is one.

    Returns: what metrics.json holds.

    Raises:
        UserError: no such or a damaged checkpoint, missing shards, a split that was trained on, no such part or transformation.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    counts = {"images": images, "draws": draws, "passes": passes, "batch_size": batch_size, "seed": seed}
    _refuse(split, counts, under, device)
    train, held_out = (ShardFolder.open(Path(shards) / name) for name in ("train", split))
    if min(images, held_out.samples) < BLOCKS * ROWS:
        raise UserError(f"{min(images, held_out.samples)} {split} images", f"{BLOCKS * ROWS} or more", "Use more.")
    path = resolve(Path(checkpoint))
    objective, run = load_objective(path)
    bench = Bench(objective.to(device), run, seed, device)

    learnt: dict[str, float] = {}
    definitions = dict(DEFINITIONS)
    for part, content in bench.measure_content(train, held_out, passes, batch_size, parts, under).items():
        about = {name: _definition(name) for name in content}
        learnt |= {_of_part(name, part): value for name, value in content.items()}
        definitions |= {_of_part(name, part): text if part == "full" else f"{part}: {text}" for name, text in about.items()}
    motion, turned, embedding = bench.measure_geometry(held_out, images, draws)
    measures = learnt | {name: fmean(values) for name, values in motion.items()}
    measures["unexplained"] = unexplained(measures["wahba_so"], measures["l_inv"])
    measures["effective_rank"] = effective_rank(embedding)
    result: dict[str, Any] = {
        "measures": measures,
        "notes": _notes(measures, embedding, objective),
        "definitions": definitions,
        "split": split,
        "images": {"train": train.samples, split: held_out.samples, "geometry": len(embedding)},
        "draws": draws,
        "seed": seed,
        "checkpoint": {"folder": str(checkpoint), "step": read_manifest(path)["step"]},
        "code": {"version": __version__, "git_commit": git_commit(), "torch": torch.__version__},
    }
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    figures.save_png(figures.angle_histogram({run.objective.name: turned}), out / "angles.png")
    bench.draw_views(held_out).save(out / "views.png")
    write_json(out / DRAWS, {"per_draw": motion, "cosines": turned})
    write_json(out / METRICS, result)
    run_folder = path.absolute().parents[1]
    add_to_run(run_folder, run.tracking, f"evaluation/{split}", out, result["checkpoint"]["step"], measures)
    return result


@dataclasses.dataclass(frozen=True)
class Bench:
    """A trained model on the bench, with the images it is shown."""

    objective: Objective
    run: Run
    seed: int
    device: str

    def measure_content(
        self,
        train: ShardFolder,
        held_out: ShardFolder,
        passes: int,
        batch_size: int,
        parts: Sequence[str],
        under: Sequence[str] = (),
    ) -> dict[str, dict[str, float]]:
        """What each part of the features holds: classes (kNN, linear probe) and known factors, by name, where there are any."""
        if train.classes is None and held_out.factors is None:
            return {part: {} for part in parts}
        light = ViewSpec("light", passes, self.run.data.size, LIGHT)
        tests = [self._plain, *(transformed(name, self.run.data.size) for name in under)]
        banks = self._extract(train, batch_size, [self._plain, light], "training images", parts)
        queries = self._extract(held_out, batch_size, tests, f"{held_out.split} images", parts)
        return {part: self._read(train, held_out, banks[part], queries[part]) for part in parts}

    def _read(self, train: ShardFolder, held_out: ShardFolder, bank: Features, query: Features) -> dict[str, float]:
        """Measures of one part."""
        measures: dict[str, float] = {}
        known, asked = bank.label >= 0, query.label >= 0
        if known.any() and asked.any():
            truth = bank.label[known], query.label[asked]
            tests = {view: values[0, asked] for view, values in query.values.items()}
            plain = bank.values["plain"][0, known]
            nearest = {view: knn_accuracy(plain, truth[0], test, truth[1]) for view, test in tests.items()}
            linear = linear_probe(bank.values["light"][:, known], truth[0], tests, truth[1], seed=self.seed)
            for name, by_view in {"knn": nearest, "linear": linear}.items():
                measures |= {name if view == "plain" else f"{name}_{view}": value for view, value in by_view.items()}
        for name in held_out.factors or ():
            x, y = _factor(train, bank, name)
            z, t = _factor(held_out, query, name)
            measures[f"{name}_r2"] = recovery(x, y, z, t)
        return measures

    def measure_geometry(
        self, held_out: ShardFolder, images: int, draws: int
    ) -> tuple[dict[str, list[float]], list[list[int]], Tensor]:
        """How the run's own transformations move the embedding.

        Returns: every measure for every draw; histograms of the cosines, [draws, BINS]; embeddings [n, d].
        """
        moved = ViewSpec("moved", draws, self.run.data.size, self.run.augmentation, shared_by="dataset")
        about = f"{draws} transformations of {min(images, held_out.samples):,} {held_out.split} images"
        features = self._extract(held_out, MOVED_BATCH, [self._plain, moved], about, ["embedding"], images)["embedding"]
        source, targets = features.values["plain"][0, :images], features.values["moved"][:, :images]
        turned = [torch.histc(cosines(source, target), figures.BINS, -1, 1).int().tolist() for target in targets]
        return measure_motion(source, targets), turned, source

    def draw_views(self, held_out: ShardFolder) -> Any:
        """Images beside the views that the objective trains on: in groups where the objective groups."""
        spec = max(self.objective.views(), key=lambda view: view.groups)
        spec = dataclasses.replace(spec, name="pair", groups=BLOCKS if spec.groups else 0)
        batch = next(iter(self._load(held_out, BLOCKS * ROWS, [self._plain, spec])))
        data = self.run.data
        return figures.view_sheet(batch.views["plain"][0], batch.views["pair"][:2], BLOCKS, data.mean, data.std)

    @property
    def _plain(self) -> ViewSpec:
        return ViewSpec("plain", 1, self.run.data.size, None)

    def _extract(
        self, folder: ShardFolder, batch_size: int, views: list[ViewSpec], about: str, parts: Sequence[str], limit: int = 10**9
    ) -> dict[str, Features]:
        """Features of the batches that hold the first `limit` images."""
        from rich.progress import track

        total = -(-min(limit, folder.samples) // batch_size)
        size = self.run.data.size
        batches = (
            dataclasses.replace(batch, views={name: centre(images, size) for name, images in batch.views.items()})
            for batch in islice(self._load(folder, batch_size, views), total)
        )
        return extract(self.objective, track(batches, f"  {about}", total), parts)

    def _load(self, folder: ShardFolder, batch_size: int, views: list[ViewSpec]) -> Loader:
        data = self.run.data
        return Loader(
            folder,
            views,
            batch_size=batch_size,
            seed=self.seed,
            device=torch.device(self.device),
            shuffle=False,
            threads=data.threads,
            mean=data.mean,
            std=data.std,
            shuffle_buffer=1,
        )


def _refuse(split: str, counts: dict[str, int], under: Sequence[str], device: str) -> None:
    """What `evaluate` was asked for and cannot do; counts by the names of its arguments."""
    if split not in ("val", "test"):
        found = f"--split is {split}"
        raise UserError(found, "val or test, images that the model has not seen", "Use test for a result, val for a choice.")
    for name, value in counts.items():
        low = 0 if name == "seed" else 1
        if type(value) is not int or value < low:
            raise UserError(f"--{name} is {value}", f"a whole number from {low}", "Correct it.")
    for name in under:
        if name not in TRANSFORMATIONS:
            near = difflib.get_close_matches(name, TRANSFORMATIONS, n=1, cutoff=0.0)[0]
            raise UserError(f"--under is {name}", f"some of {', '.join(TRANSFORMATIONS)}", f"Did you mean {near!r}?")
    if device not in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        raise UserError(f"--device is {device}", "a device of this machine", "Use --device cpu.")


def _of_part(measure: str, part: str) -> str:
    return measure if part == "full" else f"{measure}_{part}"


def _factor(folder: ShardFolder, features: Features, name: str) -> tuple[Tensor, Tensor]:
    """Features and values of one factor, of the images on which it can be seen: [N, D] and [N, 1 or 2]."""
    assert folder.factors is not None
    values = folder.factors_table()[features.index.numpy(), folder.factors.index(name)]
    unseen = [label for label, shape in enumerate(folder.classes or ()) if shape in UNSEEN.get(name, ())]
    seen = torch.from_numpy(~np.isin(features.label.numpy(), unseen))
    turn = 2 * np.pi * values
    columns = [np.sin(turn), np.cos(turn)] if name in CIRCULAR else [values]
    return features.values["plain"][0][seen], torch.from_numpy(np.stack(columns, axis=1))[seen]


def _definition(measure: str) -> str:
    for name in ("knn", "linear"):
        if measure.startswith(f"{name}_"):
            return f"{DEFINITIONS[name]} Test images under {measure.removeprefix(f'{name}_').replace('_', ' + ')}."
    if measure in DEFINITIONS:
        return DEFINITIONS[measure]
    name = measure.removesuffix("_r2")
    circle = ", as a point of the circle" if name in CIRCULAR else ""
    unseen = f"; without {' and '.join(UNSEEN[name])}, which do not show it" if name in UNSEEN else ""
    return f"R² of {name} read linearly from the frozen features of unseen images{circle}{unseen}."


def _notes(measures: dict[str, float], embedding: Tensor, objective: Objective) -> list[str]:
    """What a reader of the numbers must know about them."""
    notes = [part.remark for part in objective.modules() if isinstance(part, Objective) and part.remark]
    n, d = embedding.shape
    if not any(name.startswith("knn") for name in measures):
        notes.append("The images have no labels: kNN and linear are left out.")
    if n < 4 * d:
        notes.append(f"{n} images are fewer than 4 x {d} dimensions: rotations fit them by chance, wahba is too low.")
    if measures["effective_rank"] < 2:
        notes.append("The embedding has collapsed: its geometry means nothing.")
    return notes
