"""The notebook runs from its first cell to its last, and shows what it promises."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from projects import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


def outputs_of(notebook: Any) -> list[str]:
    """The MIME types of everything the cells showed."""
    return [
        kind
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        for kind in output.get("data", {})
    ]


def test_the_quickstart_runs(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'platform'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(cluster.project)}}
    )
    client.execute()
    shown = outputs_of(notebook)
    assert shown.count("image/png") >= 2, "two plots"
    assert "text/html" in shown, "tables"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    predicted = code[-2].outputs[-1]["data"]["text/plain"]
    first, second = predicted.strip("()").split(", ")
    assert first == second
    assert Path(cluster.storage, "models", "digits").is_dir()
