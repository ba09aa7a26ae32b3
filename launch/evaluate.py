"""Measure a checkpoint on held-out images: `python launch/evaluate.py --checkpoint C --shards DIR --out DIR`."""

from trainer.errors import exit_with_one_line


def main(
    checkpoint: str,
    shards: str,
    out: str,
    split: str = "test",
    images: int = 2000,
    draws: int = 20,
    parts: str | tuple[str, ...] = "full",
    under: str | tuple[str, ...] = (),
    passes: int = 4,
    batch_size: int = 256,
    seed: int = 0,
    device: str = "",
) -> None:
    """Measure a checkpoint on held-out images; writes metrics.json and figures.

    Args:
        checkpoint: a checkpoint or a run folder (its newest checkpoint).
        shards: the data set's folder, with train/ and the split inside.
        out: folder to write into.
        split: test for a result, val to choose settings by; never train.
        images: held-out images for the geometry, at most; many times the embedding's dimension.
        draws: transformations, each applied to all of these images.
        parts: of the representation that are probed, for example full,invariant,equivariant; see docs/methods/clever.md.
        under: transformations that kNN and the probe are tested under, for example rotation90_jitter,jitter.
        passes: light augmentations of the training images that the linear probe sees.
        batch_size: images encoded at a time.
        seed: of draws, augmentations and the probe.
        device: cpu or cuda; by default cuda where there is one.
    """
    from trainer.evaluation.evaluate import evaluate

    result = evaluate(
        str(checkpoint),
        str(shards),
        str(out),
        split=str(split),
        images=images,
        draws=draws,
        parts=_words(parts),
        under=_words(under),
        passes=passes,
        batch_size=batch_size,
        seed=seed,
        device=device,
    )
    _show(result, str(out))


def _words(value: str | tuple[str, ...]) -> list[str]:
    """Fire makes a tuple of words with commas."""
    return value.split(",") if isinstance(value, str) else list(value)


def _show(result: dict, out: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['images'][result['split']]:,} {result['split']} images, step {result['checkpoint']['step']}")
    for column in ("measure", "value", "meaning"):
        table.add_column(column, justify="right" if column == "value" else "left")
    for name, value in result["measures"].items():
        number = f"{value:.2f}" if name.startswith(("knn", "linear", "effective_rank")) else f"{value:.3f}"
        table.add_row(name, number, result["definitions"][name])
    console = Console()
    console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}")
    console.print(f"written: {out}")


if __name__ == "__main__":
    exit_with_one_line(main)
