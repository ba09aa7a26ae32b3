"""The DALI graph: shards are read and decoded once, every view of every image is cropped, blurred and mirrored by its draws.

One graph for both devices; on a GPU the decoding is mixed (without the fixed-function decoder, whose pixels differ) and the
rest runs there. Rotation and elastic transform follow in `warp.py`, colours in `colour.py`. The blur comes before them
(SimCLR's after): with rotations and colours it commutes, but for borders and clamping. Against torchvision, op by op, on
uint8 images:

- The crop has antialiasing and fractional edges (there: rounded to pixels), and reads its neighbours across its edge (there
  the edge pixel is repeated): the outermost pixels differ by 2 on average, the rest by rounding alone.
- The blur's kernel spans a tenth of the view, odd (SimCLR, Chen et al. 2020, app. A): 3 pixels at 32, 23 at 224.
"""

# DALI's stubs miss its constants and give every operator the type of all its forms.
# mypy: disable-error-code="attr-defined, arg-type, call-overload, assignment, return-value"

from collections.abc import Callable, Sequence

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali import math as dmath
from nvidia.dali.data_node import DataNode

from trainer.data.augment import crop_box
from trainer.data.shards import ShardFolder
from trainer.data.views import ViewSpec
from trainer.data.warp import canvas

Arguments = Callable[[int], list[np.ndarray]]

RESAMPLING = {"interp_type": types.INTERP_LINEAR, "antialias": True}


def build(
    folder: ShardFolder,
    views: Sequence[ViewSpec],
    arguments: Arguments,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    device_id: int | None,
    threads: int,
    seed: int,
    shuffle_buffer: int,
    checkpoint: bytes | None = None,
) -> Pipeline:
    """The pipeline of one rank.

    Args:
        folder: the shards; each rank reads a range of samples, padded so that all have equally many batches.
        views: what to make.
        arguments: iteration -> arrays [batch_size, ...] as `to_arguments` returns them for the folder's `image_shape`; besides
            the reader's shuffling the only source of randomness.
        device_id: of the GPU, None for the CPU.
        shuffle_buffer: samples in the reader's shuffle buffer; 0 reads in order.
        checkpoint: of an equal pipeline, to go on from.

    Outputs: the views in order, copies one by one, uint8 [B, 3, P, P] with P the size (or more: `warp.canvas`); then `cls`
        and `index`, uint8 [B, 8].
    """

    def graph() -> tuple[DataNode, ...]:
        encoded, label, index = _read(folder, rank, world_size, seed, shuffle_buffer)
        gpu = device_id is not None
        # The GPU's fixed-function JPEG decoder is left out: its pixels differ, and so would a resumed run on another GPU.
        images = fn.decoders.image(encoded, device="mixed" if gpu else "cpu", **({"hw_decoder_load": 0.0} if gpu else {}))
        sides = None if folder.image_shape else _sides_of_a_square(images)
        count = sum(len(_parameters(view, copy, folder.image_shape)) for view in views for copy in range(view.count))
        drawn = iter(fn.external_source(source=arguments, num_outputs=count, batch=True) if count else ())
        outputs = []
        for view in views:
            for copy in range(view.count):
                parameters = {name: next(drawn) for name in _parameters(view, copy, folder.image_shape)}
                size = canvas(view.of(copy), view.size)
                pixels = _augmented(images, sides, size, parameters) if parameters else _plain(images, size)
                outputs.append(_centre(pixels, parameters.get("flip", 0), size))
        return *outputs, label, index

    define = pipeline_def(enable_conditionals=True, enable_checkpointing=True, checkpoint=checkpoint)(graph)
    return define(batch_size=batch_size, num_threads=threads, device_id=device_id, seed=seed * world_size + rank)


def to_arguments(
    views: Sequence[ViewSpec], draws: dict[str, dict[str, np.ndarray]], image_shape: tuple[int, int] | None
) -> list[np.ndarray]:
    """The draws of `augment.draw_view` by view name, as the graph of the same views and a folder of that shape takes them."""
    arrays = []
    for view in views:
        for copy in range(view.count if draws[view.name] else 0):
            drawn = {name: value[copy] for name, value in draws[view.name].items()}
            adapted = drawn | {
                "flip": drawn["flip"].astype(np.int32),
                # Beyond three standard deviations the kernel is below what uint8 resolves.
                "window": np.minimum(_kernel(view.size), 2 * np.ceil(3 * drawn["sigma"]) + 1).astype(np.int32),
            }
            if image_shape:  # one call a batch; in the graph it is a dozen operators an image
                box = crop_box(drawn["extent"], drawn["anchor"], *image_shape)
                adapted |= {"start": np.ascontiguousarray(box[:, :2]), "end": np.ascontiguousarray(box[:, 2:])}
            arrays += [adapted[name] for name in _parameters(view, copy, image_shape)]
    return arrays


def _parameters(view: ViewSpec, copy: int, image_shape: tuple[int, int] | None) -> tuple[str, ...]:
    """Names of the arguments that one copy of a view takes, in order."""
    augmentation = view.of(copy)
    if augmentation is None:
        return ()
    blur = ("sigma", "window") if augmentation.blur > 0 and _kernel(view.size) > 1 else ()
    return (*(("start", "end") if image_shape else ("extent", "anchor")), "flip", *blur)


def _kernel(size: int) -> int:
    """Width of the blur's kernel in pixels, odd; below 20 pixels there is no blur."""
    return 2 * (size // 20) + 1


def _read(folder: ShardFolder, rank: int, world_size: int, seed: int, shuffle_buffer: int) -> list[DataNode]:
    shuffled = {
        "random_shuffle": True,
        "initial_fill": shuffle_buffer,
        "shuffle_after_epoch": True,  # the order of the tars, alike on all ranks
        "shuffle_after_epoch_seed": seed,
    }
    components: list[DataNode] = fn.readers.webdataset(
        paths=folder.tar_paths,
        index_paths=folder.index_paths,
        ext=[folder.image_extension, "cls", "index"],
        dtypes=[types.UINT8] * 3,
        missing_component_behavior="error",
        shard_id=rank,
        num_shards=world_size,
        pad_last_batch=True,
        **(shuffled if shuffle_buffer else {}),
    )
    return components


def _sides_of_a_square(images: DataNode) -> DataNode:
    """Height and width of the square of an image's area, relative to the image, float32 [2]; see `augment.crop_box`."""
    log_side = dmath.log(images.shape(dtype=types.FLOAT)[:2])
    return dmath.exp(fn.reductions.mean(log_side) - log_side)


def _box(sides: DataNode, drawn: dict[str, DataNode]) -> tuple[DataNode, DataNode]:
    """Start and end of the crop, as `augment.crop_box`."""
    box = drawn["extent"] * sides
    box = box / dmath.max(fn.reductions.max(box), 1.0)
    start = drawn["anchor"] * (1.0 - box)
    return start, start + box


def _augmented(images: DataNode, sides: DataNode | None, size: int, drawn: dict[str, DataNode]) -> DataNode:
    """uint8 [size, size, 3] from the draws of one copy."""
    start, end = (drawn["start"], drawn["end"]) if sides is None else _box(sides, drawn)
    x = fn.resize(images, size=[size, size], roi_start=start, roi_end=end, roi_relative=True, **RESAMPLING)
    if "sigma" in drawn:
        sigma = drawn["sigma"]
        if sigma > 0.0:
            x = fn.gaussian_blur(x, sigma=sigma, window_size=drawn["window"])
    return x


def _plain(images: DataNode, size: int) -> DataNode:
    """The evaluation view: the shorter side 8/7 of the view (256 for 224; the view itself up to 64 pixels), uncropped."""
    return fn.resize(images, resize_shorter=size if size <= 64 else round(size * 256 / 224), **RESAMPLING)


def _centre(pixels: DataNode, mirror: DataNode | int, size: int) -> DataNode:
    """The centre, mirrored, uint8 [3, size, size]."""
    return fn.crop_mirror_normalize(pixels, crop=(size, size), mirror=mirror, dtype=types.UINT8, output_layout="CHW")
