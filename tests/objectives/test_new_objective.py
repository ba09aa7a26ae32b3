"""The worked example of docs/new_objective.md is a method like the others: one file, one registry line."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch
from scipy.spatial.distance import pdist
from torch.nn.functional import normalize

import trainer.objectives
from methods import batch_of, build, wrapped
from trainer.objectives import objective

PAGE = Path(__file__).parents[2] / "docs" / "new_objective.md"
SECTION = {"name": "alignment", "hidden": 12, "dim": 6, "t": 3}


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The page's code as a file of the package, and the registry as it was afterwards."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "alignment.py").write_text(code)
    monkeypatch.setattr(objective, "_REGISTRY", dict(objective.registry()))
    monkeypatch.setattr(trainer.objectives, "__path__", [*trainer.objectives.__path__, str(tmp_path)])
    assert "alignment" in objective.registry()
    yield importlib.import_module("trainer.objectives.alignment")
    del sys.modules["trainer.objectives.alignment"]


def test_its_loss_is_the_papers(example):
    z1, z2 = normalize(torch.randn(2, 9, 6, dtype=torch.float64), dim=2)
    branch = build(SECTION).double().branch
    found, _ = branch.loss(type("Outputs", (), {"embedding": torch.stack([z1, z2])}))
    potentials = [float(torch.from_numpy(pdist(z.numpy(), "sqeuclidean")).mul(-3).exp().mean().log()) for z in (z1, z2)]
    assert found.item() == pytest.approx(float((z1 - z2).norm(dim=1).square().mean()) + sum(potentials) / 2, rel=1e-6)


@pytest.mark.parametrize("wrapper", [None, "care", "clever"])
def test_it_trains_alone_and_in_every_wrapper(example, wrapper):
    method = build(wrapped(wrapper, SECTION) if wrapper else SECTION)
    views = {view.name: torch.randn(view.count, 16, 3, view.size, view.size) for view in method.views()}
    optimiser = torch.optim.AdamW(method.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        method.before_step(step / 30, step / 10)
        total = method(batch_of(views)).total
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        method.after_step()
        losses.append(total.item())
    assert losses[-1] < losses[0] - 0.05
