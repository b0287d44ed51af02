"""A project with recipes in it, importable under a name that no other test uses."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

RECIPES = '''
import torch
from torch import nn

from shoal.recipe import Recipe


class Small(Recipe):
    """Batch norm for its buffers, tied weights, and a buffer that is not stored."""

    width: int = 4
    broken: bool = False

    def build_model(self):
        if self.broken:
            raise RuntimeError("no such layer")
        return Net(self.width)


class Returns(Recipe):
    what: str = "pair"

    def build_model(self):
        return {"none": None, "pair": Pair(), "scalar": Scalar()}[self.what]


class NotARecipe:
    pass


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.embed = nn.Linear(width, 5, bias=False)
        self.out = nn.Linear(width, 5, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scratch", torch.randn(2), persistent=False)

    def forward(self, x):
        return self.out(self.drop(self.norm(self.first(x))))


class Pair(nn.Module):
    def forward(self, x):
        return x, x


class Scalar(nn.Module):
    def forward(self, x):
        return x.sum()
'''


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with the module ``models_project``."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "models_project.py").write_text(RECIPES)
    monkeypatch.syspath_prepend(folder)
    yield folder
    sys.modules.pop("models_project", None)
