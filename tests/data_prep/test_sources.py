"""Real images: the official layouts against torchvision's readers, folders of all kinds of files, and bad files."""

import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from stored import encoded, files, stored

from data_prep import synthetic
from data_prep.make_shards import make
from trainer.data.shards import ShardFolder
from trainer.errors import UserError


def write_cifar(root: Path, name: str, rng: np.random.Generator) -> None:
    """A small CIFAR in both official layouts: `bin`/... and `py`/..., 12 images a file."""
    hundred = name == "cifar100"
    folders = ("cifar-100-binary", "cifar-100-python") if hundred else ("cifar-10-batches-bin", "cifar-10-batches-py")
    binary, python = (root / kind / folder for kind, folder in zip(("bin", "py"), folders, strict=True))
    binary.mkdir(parents=True)
    python.mkdir(parents=True)
    for batch in ("train", "test") if hundred else (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = rng.integers(0, 256, (12, 3072), np.uint8)
        coarse, labels = rng.integers(0, 10, (2, 12), np.uint8)
        columns = [coarse[:, None], labels[:, None], data] if hundred else [labels[:, None], data]
        (binary / f"{batch}.bin").write_bytes(np.concatenate(columns, 1).tobytes())
        content = {
            "data": data,
            "fine_labels" if hundred else "labels": labels.tolist(),
            "filenames": [f"{i}.png" for i in range(12)],
        }
        (python / batch).write_bytes(pickle.dumps(content, 2))
    names = [f"class_{i}" for i in range(10)]
    (binary / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text("\n".join(names) + "\n\n")
    (python / ("meta" if hundred else "batches.meta")).write_bytes(
        pickle.dumps({"fine_label_names": names, "label_names": names})
    )


def write_stl10(root: Path, rng: np.random.Generator) -> None:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for part, n in (("train", 10), ("test", 6), ("unlabeled", 20)):
        rng.integers(0, 256, (n, 3, 96, 96), np.uint8).tofile(folder / f"{part}_X.bin")
        if part != "unlabeled":
            rng.integers(1, 11, n).astype(np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class_{i}" for i in range(10)))


def torchvision_set(name: str, root: Path, split: str) -> set[tuple[bytes, int]]:
    """(pixels, label) of every image as torchvision reads them, its checksums of the official files set aside."""
    from torchvision import datasets

    base = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[name]
    members = {"_check_integrity": lambda self: True}
    if name != "stl10":
        members["meta"] = base.meta | {"md5": None}
        dataset = type("Unchecked", (base,), members)(str(root), train=split == "train")
    else:
        dataset = type("Unchecked", (base,), members)(str(root), split="train+unlabeled" if split == "train" else split)
    return {(np.asarray(image).tobytes(), int(label)) for image, label in dataset}


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_official_files_are_read_as_torchvision_reads_them(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_stl10(tmp_path / "py", rng) if name == "stl10" else write_cifar(tmp_path, name, rng)
    make(name, str(tmp_path / "py"), str(tmp_path / "out"), workers=1)
    train, val, test = (stored(tmp_path / "out" / split) for split in ("train", "val", "test"))
    assert {(s["png"].tobytes(), s["cls"]) for s in train + val} == torchvision_set(name, tmp_path / "py", "train")
    assert {(s["png"].tobytes(), s["cls"]) for s in test} == torchvision_set(name, tmp_path / "py", "test")
    assert all(s["cls"] >= 0 for s in val)  # STL-10: a tenth of the labelled, whatever the unlabelled are
    if name != "stl10":
        make(name, str(tmp_path / "bin"), str(tmp_path / "out_bin"), workers=1)
        assert files(tmp_path / "out_bin") == files(tmp_path / "out")


def test_real_cifar10_is_the_same_from_both_layouts(shared_data: Path, tmp_path: Path) -> None:
    script = shared_data / "unpack_cifar10.py"
    subprocess.run([sys.executable, script, shared_data / "cifar10", tmp_path / "raw"], check=True, capture_output=True)
    for layout in ("bin", "py"):
        make("cifar10", str(tmp_path / "raw" / f"cifar-10-batches-{layout}"), str(tmp_path / layout), limit=300, workers=1)
    assert files(tmp_path / "bin") == files(tmp_path / "py")
    real = torchvision_set("cifar10", tmp_path / "raw", "test")
    assert {(s["png"].tobytes(), s["cls"]) for s in stored(tmp_path / "py" / "test")} <= real


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    write_cifar(tmp_path, "cifar10", np.random.default_rng(0))
    (tmp_path / "py/cifar-10-batches-py/data_batch_3").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"data_batch_3 cannot be read \(it would run"):
        make("cifar10", str(tmp_path / "py"), str(tmp_path / "out"), workers=1)
    assert not (tmp_path / "ran").exists()


def test_a_cut_binary_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path, "cifar10", np.random.default_rng(0))
    with (tmp_path / "bin/cifar-10-batches-bin/data_batch_3.bin").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(UserError, match=r"data_batch_3\.bin has 5000 bytes"):
        make("cifar10", str(tmp_path / "bin"), str(tmp_path / "out"), workers=1)


def test_a_folder_is_stored_byte_for_byte(photographs: Path, tmp_path: Path) -> None:
    make("imagefolder", str(photographs), str(tmp_path / "out"), validation=0.25, workers=1)
    original = {path.read_bytes(): "abc".index(path.parent.name) for path in photographs.rglob("*.jpg")}
    for split, samples in (("train", 18), ("val", 6)):
        folder = ShardFolder.open(tmp_path / "out" / split)
        assert (folder.samples, folder.classes, folder.image_extension) == (samples, ("a", "b", "c"), "jpg")
    assert encoded(tmp_path / "out/train") | encoded(tmp_path / "out/val") == original
    assert not (tmp_path / "out" / "test").exists()


def test_train_and_val_folders_and_a_folder_without_classes(photographs: Path, tmp_path: Path) -> None:
    for source, target in (("a", "train/x"), ("b", "train/y/deeper"), ("c", "val/y")):
        (tmp_path / "split" / target).parent.mkdir(parents=True, exist_ok=True)
        (photographs / source).rename(tmp_path / "split" / target)
    make("imagefolder", str(tmp_path / "split"), str(tmp_path / "out"), workers=1)
    labels = {split: [s["cls"] for s in stored(tmp_path / "out" / split)] for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in labels.items()} == {"train": 14, "val": 2, "test": 8}
    assert labels["test"] == [1] * 8
    make("imagefolder", str(tmp_path / "split/train/x"), str(tmp_path / "flat"), workers=1)
    assert {s["cls"] for s in stored(tmp_path / "flat/train")} == {-1}
    assert ShardFolder.open(tmp_path / "flat/train").classes is None


def test_without_class_folders_or_with_unlabelled_every_label_is_minus_one(photographs: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    for number, path in enumerate(photographs.rglob("*.jpg")):
        target = plain / ("test" if number % 3 else "train") / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    make("imagefolder", str(plain), str(tmp_path / "plain_out"), workers=1)
    make("imagefolder", str(photographs), str(tmp_path / "nested_out"), unlabelled=True, workers=1)
    for out, splits in (("plain_out", ("train", "val", "test")), ("nested_out", ("train", "val"))):
        found = [encoded(tmp_path / out / split) for split in splits]
        assert sum(map(len, found)) == 24
        assert {label for split in found for label in split.values()} == {-1}
        assert all(ShardFolder.open(tmp_path / out / split).classes is None for split in splits)
    with pytest.raises(UserError, match="made with content"):
        make("imagefolder", str(photographs), str(tmp_path / "nested_out"), workers=1)


BAD = {
    "empty file": ("empty.jpg", b""),
    "corrupt": ("cut.jpg", None),
    "wrong extension, it is jpg": ("really_jpg.png", None),
    "not an image": ("text.jpg", b"<html>404 not found</html>"),
    "not named as an image": ("notes.txt", b"to do"),
}


def spoil(folder: Path) -> None:
    good = (folder / "a" / "image 0.jpg").read_bytes()
    for name, data in BAD.values():
        (folder / "b" / name).write_bytes({"cut.jpg": good[:-300], "really_jpg.png": good}.get(name, data))


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_file_is_named_with_its_reason(reason: str, photographs: Path, tmp_path: Path) -> None:
    spoil(photographs)
    for name, _ in BAD.values():
        if name != BAD[reason][0]:
            (photographs / "b" / name).unlink()
    with pytest.raises(UserError, match=rf"1 bad images: .*{BAD[reason][0]} \({reason}"):
        make("imagefolder", str(photographs), str(tmp_path / "out"), workers=1)
    assert not files(tmp_path / "out")


def test_all_bad_files_are_counted_in_one_line_and_nothing_is_written(photographs: Path, tmp_path: Path) -> None:
    spoil(photographs)
    script = Path(__file__).parents[2] / "data_prep" / "make_shards.py"
    args = ["--source=imagefolder", f"--root={photographs}", f"--out={tmp_path / 'out'}", "--shard_size=5", "--workers=2"]
    run = subprocess.run([sys.executable, script, *args], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: 5 bad images: ")
    assert run.stderr.count("\n") == 1
    assert not files(tmp_path / "out")


def test_skip_bad_leaves_them_out_without_gaps(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spoil(photographs)
    make("imagefolder", str(photographs), str(tmp_path / "out"), validation=0, skip_bad=True, shard_size=7, workers=1)
    assert "5 bad images of 29 left out" in capsys.readouterr().err
    assert [s["index"] for s in stored(tmp_path / "out/train")] == list(range(24))


def odd_images() -> dict[str, list[tuple[str, bytes]]]:
    """Files by extension: grey, CMYK, palette, transparent, 1-bit, animated and turned ones."""
    base = Image.fromarray(synthetic.draw(3, 0, np.arange(3, 4), 96)[0][0]).resize((96, 64))
    ramp = Image.fromarray(np.tile(np.arange(96, dtype=np.uint8), (64, 1)))
    clear, turned = base.copy(), Image.Exif()
    clear.putalpha(ramp)
    turned[0x112] = 6
    frames = {"save_all": True, "append_images": [ImageOps.invert(base)]}
    variants = {
        "jpg": {
            "plain": (base, {}),
            "grey": (base.convert("L"), {}),
            "cmyk": (base.convert("CMYK"), {}),
            "turned": (base, {"exif": turned}),
        },
        "png": {
            "plain": (base, {}),
            "one_bit": (base.convert("1"), {}),
            "palette": (base.quantize(64), {"transparency": 3}),
            "clear": (clear, {}),
            "grey_clear": (clear.convert("LA"), {}),
            "turned": (base, {"exif": turned}),
            "animated": (base, frames),
        },
        "webp": {
            "plain": (base, {"lossless": True}),
            "clear": (clear, {"lossless": True}),
            "animated": (base, {"lossless": True, **frames}),
        },
    }
    encoded: dict[str, list[tuple[str, bytes]]] = {}
    for extension, named in variants.items():
        for name, (image, options) in named.items():
            buffer = io.BytesIO()
            image.save(buffer, "jpeg" if extension == "jpg" else extension, **options)
            encoded.setdefault(extension, []).append((f"{name}.{extension}", buffer.getvalue()))
    return encoded


@pytest.mark.parametrize("extensions", [("jpg",), ("png",), ("webp",), ("png", "jpg")])
def test_dali_decodes_every_kind_as_pillow_does_upright(extensions: tuple[str, ...], tmp_path: Path) -> None:
    """A mixed folder takes the kind of its majority, here png."""
    from nvidia.dali import fn, pipeline_def

    expected = []
    (tmp_path / "in").mkdir()
    for name, data in [file for extension in extensions for file in odd_images()[extension]]:
        (tmp_path / "in" / name).write_bytes(data)
        expected.append(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))
    make("imagefolder", str(tmp_path / "in"), str(tmp_path / "out"), validation=0, workers=1)
    split = ShardFolder.open(tmp_path / "out" / "train")
    assert split.image_extension == extensions[0]
    shapes = {image.shape[:2] for image in expected}
    assert split.image_shape == (shapes.pop() if len(shapes) == 1 else None)

    @pipeline_def(batch_size=split.samples, num_threads=1, device_id=None)
    def pipeline():
        encoded = fn.readers.webdataset(paths=split.tar_paths, index_paths=split.index_paths, ext=[split.image_extension])
        return fn.decoders.image(encoded, device="cpu")

    (images,) = pipeline().run()
    found = [np.asarray(images.at(i)) for i in range(split.samples)]
    assert len(found) == len(expected)
    for image in expected:
        nearest = min(abs(image.astype(int) - other).mean() for other in found if other.shape == image.shape)
        assert nearest < 0.5  # of 255
