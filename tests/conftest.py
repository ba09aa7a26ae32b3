"""Fixtures that several test folders share."""

import os
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: bits depend on the number of threads, and runs.py sets one
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit-identity is the CPU's promise; benchmarks/gpu_check.py is for GPUs


@pytest.fixture(scope="session")
def synthetic_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ (450 images in 5 shards), val/ and test/ (50 each): drawn 32-pixel images, seed 0."""
    from data_prep.make_shards import make

    out = tmp_path_factory.mktemp("shards") / "synthetic"
    make(out=str(out), samples=500, shard_size=100, workers=1)
    return out


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images that some checkouts have beside them: CARE_SHARED_DATA, or ../shared/data."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CARE_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real images in {folder}; set CARE_SHARED_DATA")
    return folder
