"""The benchmarks and the demo can be imported: a name that they use and that is gone is noticed here."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from projects import ROOT

MODULES = sorted(
    f"{folder}.{path.stem}"
    for folder in ("benchmarks", "demo")
    for path in Path(ROOT / folder).glob("*.py")
    if path.stem not in ("__init__", "bare_ddp")
)


@pytest.mark.parametrize("module", MODULES)
def test_it_can_be_imported(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    importlib.import_module(module)
    assert module in sys.modules
