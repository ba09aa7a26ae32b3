import re
from pathlib import Path

import pytest

from trainer.config import Augmentation, load_run

DOCS = (Path(__file__).parents[2] / "docs" / "views.md").read_text()
INHERIT = {"BAug": "demo", "CAug": "BAug.yaml", "CAug+": "CAug.yaml"}


@pytest.fixture
def families(tmp_path, monkeypatch) -> dict[str, Augmentation]:
    """The documentation's blocks as recipes, each inheriting the one before."""
    monkeypatch.chdir(tmp_path)
    for name, block in re.findall(r"```yaml\n# (\S+)\n(.*?)```", DOCS, re.DOTALL):
        Path(f"{name}.yaml").write_text(f"inherit: {INHERIT[name]}\n{block}")
    return {name: load_run(f"{name}.yaml").augmentation for name in INHERIT}


def test_the_documented_recipes_make_the_documented_views(families):
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in DOCS.splitlines() if line.startswith("|")]
    start = next(i for i, row in enumerate(table) if row[0] == "family")
    names, rows = table[start][2:], table[start + 2 : start + 11]
    assert [(family, view) for family, view, *_ in rows] == [(f, v) for f in INHERIT for v in ("first", "second", "local")]
    for family, view, *cells in rows:
        a = families[family] if view == "first" else families[family].variant(view)
        for name, cell in zip(names, cells, strict=True):
            said = tuple(map(float, cell.split(" to ")))
            drawn = getattr(a, name)
            assert said == (drawn if isinstance(drawn, tuple) else (drawn,)), (family, view, name)
        assert (a.corners, a.elastic_alpha) == ("inscribed", 100)
