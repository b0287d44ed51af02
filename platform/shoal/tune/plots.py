"""Pictures of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shoal.recipe import Objective
from shoal.train.plots import new_figure
from shoal.tune.record import Trial, TrialState

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MAX_FIELDS = 5
_COLUMNS = 3


def plot_sweep(title: str, trials: Sequence[Trial], objective: Objective, space: Mapping[str, Any]) -> Figure:
    """The objective by trial with the best so far, then against each searched field (the first five).

    ``space`` is what the sweep's identity holds. Pruned trials are hollow.
    """
    fields = list(space)[:_MAX_FIELDS]
    num_panels = 1 + len(fields)
    columns = min(_COLUMNS, num_panels)
    rows = -(-num_panels // columns)
    figure = new_figure(figsize=(4.2 * columns, 3.2 * rows))
    figure.suptitle(title)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    measured = [trial for trial in trials if trial.value is not None]
    _scatter(panels[0], [float(trial.number) for trial in measured], measured)
    _best_so_far(panels[0], measured, objective)
    panels[0].set(xlabel="trial", ylabel=objective.metric)
    for axes, name in zip(panels[1:], fields, strict=False):
        _against(axes, name, space[name], measured)
    for axes in panels[num_panels:]:
        axes.set_visible(False)
    return figure


def _against(axes: Axes, name: str, domain: Mapping[str, Any], trials: list[Trial]) -> None:
    axes.set_xlabel(name)
    if "choice" in domain:
        values = domain["choice"]
        _scatter(axes, [float(values.index(trial.fields[name])) for trial in trials], trials)
        axes.set_xticks(range(len(values)), [str(value) for value in values])
        return
    _scatter(axes, [float(trial.fields[name]) for trial in trials], trials)
    if domain.get("log"):
        axes.set_xscale("log")


def _scatter(axes: Axes, places: list[float], trials: list[Trial]) -> None:
    for is_pruned in (False, True):
        chosen = [
            (place, trial.value)
            for place, trial in zip(places, trials, strict=True)
            if (trial.state is TrialState.PRUNED) == is_pruned
        ]
        xs, ys = [place for place, _ in chosen], [value for _, value in chosen]
        axes.scatter(xs, ys, s=22, facecolors="none" if is_pruned else "C0", edgecolors="C0")  # type: ignore[arg-type]
    axes.grid(alpha=0.3)


def _best_so_far(axes: Axes, trials: list[Trial], objective: Objective) -> None:
    best: list[float] = []
    for trial in trials:
        value = float(trial.value)  # type: ignore[arg-type]  # the caller kept those that measured it
        best.append(value if not best or objective.is_better(value, best[-1]) else best[-1])
    axes.step([trial.number for trial in trials], best, where="post", color="C1", label="best so far")
    axes.legend()
