"""Curves of a run."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING

from shoal.recipe import Objective

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def plot_run(title: str, frame: pd.DataFrame, names: Sequence[str], objective: Objective | None) -> Figure:
    """One panel for the losses and one for the rest of ``names`` over steps."""
    chosen = list(names) or _default_names(frame, objective)
    losses = [name for name in chosen if name.endswith("loss")]
    panels = [group for group in (losses, [n for n in chosen if n not in losses]) if group]
    figure = new_figure(figsize=(5.5 * max(1, len(panels)), 3.2))
    figure.suptitle(title)
    for axes, group in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
        for name in group:
            curve = frame[name].dropna()
            axes.plot(curve.index, curve.to_numpy(), label=name, marker="." if len(curve) < 30 else "")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def new_figure(*, figsize: tuple[float, float]) -> Figure:
    """An empty figure that shows itself in a notebook, whatever matplotlib's backend is there."""
    from matplotlib.figure import Figure

    class Chart(Figure):
        def _repr_png_(self) -> bytes:
            png = BytesIO()
            self.savefig(png, format="png", dpi=110)
            return png.getvalue()

    return Chart(figsize=figsize, layout="constrained")


def _default_names(frame: pd.DataFrame, objective: Objective | None) -> list[str]:
    wanted = ["loss", "val_loss", *([f"val_{objective.metric}"] if objective else [])]
    return [name for name in dict.fromkeys(wanted) if name in frame.columns]
