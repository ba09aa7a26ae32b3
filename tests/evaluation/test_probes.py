"""kNN and the linear probe against independent implementations; extraction leaves the model as it was."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import normalize

from trainer.config import Augmentation
from trainer.data.views import Batch
from trainer.evaluation.features import extract
from trainer.evaluation.knn import knn_accuracy
from trainer.evaluation.linear import linear_probe
from trainer.objectives.objective import Objective


def blobs(n, spread, seed, classes=4, d=16):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=torch.Generator().manual_seed(99))
    label = torch.randint(classes, (n,), generator=generator)
    return centres[label] + spread * torch.randn(n, d, generator=generator), label


@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_knn_is_the_weighted_vote_of_scikit_learns_neighbours(k, monkeypatch):
    from sklearn.neighbors import KNeighborsClassifier

    monkeypatch.setattr("trainer.evaluation.knn.CHUNK", 17)  # several chunks, the last one short
    bank, bank_label = blobs(200, 1.5, 1)
    query, query_label = blobs(100, 1.5, 2)
    reference = KNeighborsClassifier(
        n_neighbors=min(k, 200), metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(bank.numpy(), bank_label.numpy())
    expected = 100 * reference.score(query.numpy(), query_label.numpy())
    assert knn_accuracy(bank, bank_label, query, query_label, k=k) == pytest.approx(expected)


def test_knn_counts_a_class_that_the_bank_lacks_as_wrong():
    bank, query = torch.eye(3), torch.eye(3)
    assert knn_accuracy(bank, torch.tensor([0, 1, 1]), query, torch.tensor([0, 1, 7])) < 100


def test_the_linear_probe_is_as_good_as_scikit_learns_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    train, label = blobs(3000, 1.2, 3)
    test, truth = blobs(2000, 1.2, 4)
    noise = torch.randn_like(test)
    expected = 100 * LogisticRegression(max_iter=1000).fit(train.numpy(), label.numpy()).score(test.numpy(), truth.numpy())
    ours = linear_probe(50 * train[None] - 7, label, {"plain": 50 * test - 7, "noise": noise}, truth)
    assert 60 < expected < 99
    assert abs(ours["plain"] - expected) < 1
    assert abs(ours["noise"] - 25) < 5  # of four classes, by chance


def test_the_linear_probe_repeats_itself_and_uses_every_pass():
    train, label = blobs(300, 2.0, 5)
    test, truth = blobs(500, 2.0, 6)
    once = linear_probe(train[None], label, {"plain": test}, truth, epochs=4)
    torch.manual_seed(1)
    assert linear_probe(train[None], label, {"plain": test}, truth, epochs=4) == once
    misled = torch.stack([train, train[torch.randperm(300)]])
    assert linear_probe(misled, label, {"plain": test}, truth, epochs=4) != once


class Tiny(Objective):
    """An encoder with BatchNorm and one part that is kept in evaluation mode."""

    def __init__(self):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(encoder, None, Augmentation(), 8)
        self.teacher = nn.BatchNorm1d(6).eval()

    def embed(self, images):
        return normalize(self.backbone(images), dim=1)


def batches(order, labels=None):
    images = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for rows in torch.tensor(order).split(4):
        view = images[rows]
        yield Batch({"image": view[None], "two": torch.stack([view, view.flip(3)])}, rows, rows % 3)


def test_extraction_freezes_batchnorm_and_gives_every_mode_back():
    objective = Tiny().train()
    objective.teacher.eval()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    features = extract(objective, batches(range(10)))["full"]
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert objective.training
    assert objective.backbone[1].training
    assert not objective.teacher.training
    assert not features.values["image"].requires_grad


def test_features_do_not_depend_on_the_order_or_the_batch_and_come_sorted():
    objective = Tiny()
    straight = extract(objective, batches(range(10)), ["embedding"])["embedding"]
    shuffled = extract(objective, batches([7, 2, 9, 0, 1, 5, 3, 8, 6, 4]), ["embedding"])["embedding"]
    assert straight.index.tolist() == shuffled.index.tolist() == list(range(10))
    assert straight.label.tolist() == shuffled.label.tolist() == [i % 3 for i in range(10)]
    for name, count in (("image", 1), ("two", 2)):
        assert straight.values[name].shape == (count, 10, 6)
        torch.testing.assert_close(straight.values[name], shuffled.values[name])
    torch.testing.assert_close(straight.values["image"][0], straight.values["two"][0])


def test_two_ranks_gather_what_one_rank_extracts(tmp_path):
    mp.spawn(_one_of_two_ranks, args=(f"file://{tmp_path}/store",), nprocs=2)


def _one_of_two_ranks(rank, store):
    alone = extract(Tiny(), batches(range(10)))["full"]
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mine = [[0, 2, 4, 6, 8, 9], [1, 3, 5, 7, 9]][rank]  # of different lengths, and one image in both
    joint = extract(Tiny(), batches(mine))["full"]
    assert torch.equal(joint.index, alone.index)
    assert torch.equal(joint.label, alone.label)
    torch.testing.assert_close(joint.values, alone.values)
    assert torch.equal(extract(Tiny(), batches(range(10)) if rank else [])["full"].index, alone.index)
    torch.distributed.destroy_process_group()
