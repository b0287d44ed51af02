"""``make chaos``: every worker killed at every step and point, and more. Exit status 1 if anything is not proven."""

from __future__ import annotations

import argparse
import secrets
import sys
import tempfile
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from faults.campaign import Campaign, Verdict
from faults.plan import Scenario, Scheduler, every_byte, every_death

SHARDS = 4
GROUPS = ((3, SHARDS), (3, None), (2, None))
"""(workers, shards) of the runs that are killed everywhere; None is a fast run."""


def main() -> int:
    """Play what was asked for; the exit status says whether all of it is proven."""
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32), help="of the random scenarios")
    parser.add_argument(
        "--random", type=int, default=50, metavar="N", help="number of random sequences of deaths"
    )
    parser.add_argument(
        "--stride", type=int, default=256, metavar="BYTES", help="between two kills inside a file"
    )
    parser.add_argument("--part", default="1/1", metavar="K/N", help="play only the K-th of N parts")
    parser.add_argument("--list", action="store_true", help="only say what would be played")
    asked = parser.parse_args()
    part, parts = map(int, asked.part.split("/"))
    folder = Path(tempfile.mkdtemp(prefix="shoal-chaos-"))
    console = Console()
    console.print(f"seed {asked.seed}; what fails is kept in {folder}")
    with Campaign(folder) as campaign:
        everything = list(scenarios(campaign, asked.seed, asked.random, asked.stride))[part - 1 :: parts]
        if asked.list:
            for scenario in everything:
                console.print(str(scenario), highlight=False)
            return 0
        verdicts = play(campaign, everything, console)
    console.print(table(verdicts))
    wrong = [verdict for verdict in verdicts if verdict.problems]
    for verdict in wrong:
        console.print(f"[bold red]not proven[/]: {verdict.scenario}", highlight=False)
        for problem in verdict.problems:
            console.print(f"  {problem}", highlight=False)
    again = f"--seed {asked.seed} --random {asked.random} --stride {asked.stride}"
    console.print(f"{len(verdicts) - len(wrong)} of {len(verdicts)} proven; the same again: {again}")
    return 1 if wrong or not verdicts else 0


def scenarios(campaign: Campaign, seed: int, count: int, stride: int) -> Iterator[Scenario]:
    """The whole product, and ``count`` random sequences."""
    for workers, shards in GROUPS:
        size = campaign.size(workers, shards)
        yield from every_death(size, workers=workers, shards=shards)
        yield from every_byte(size, workers=workers, shards=shards, stride=stride)
    scheduler = Scheduler(seed, campaign.size(3, SHARDS), SHARDS)
    for number, (workers, shards) in enumerate(islice(cycle(((3, SHARDS), (2, SHARDS), *GROUPS[1:])), count)):
        exact = shards is not None
        if number % 3:
            yield scheduler.sequence(workers=workers, exact=exact, deaths=1 + number % 4)
        else:
            yield scheduler.rescuer_dies(workers=workers, exact=exact)


def play(campaign: Campaign, everything: list[Scenario], console: Console) -> list[Verdict]:
    """Judge them all, with a bar."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    verdicts = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(everything))
        for verdict in campaign.judge_all(everything):
            verdicts.append(verdict)
            if verdict.problems:
                progress.console.print(f"[red]{verdict.scenario}[/]: {verdict.problems[0]}", highlight=False)
            progress.update(task, advance=1, description=verdict.scenario.name)
    return verdicts


def table(verdicts: list[Verdict]) -> Table:
    """What was proven, by kind of run and of fault."""
    shown = Table(title="proof by fault")
    for name in ("run", "fault", "scenarios", "deaths", "steps lost", "proven"):
        shown.add_column(name, justify="left" if name in ("run", "fault") else "right")
    rows: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        rows.setdefault((f"{verdict.scenario.kind}", fault_of(verdict.scenario)), []).append(verdict)
    for (kind, fault), group in rows.items():
        proven = sum(not verdict.problems for verdict in group)
        shown.add_row(
            kind,
            fault,
            str(len(group)),
            str(sum(verdict.deaths for verdict in group)),
            str(sum(verdict.steps_lost for verdict in group)),
            f"[{'green' if proven == len(group) else 'bold red'}]{proven}[/]",
        )
    return shown


def fault_of(scenario: Scenario) -> str:
    """What kind of scenario it is."""
    faults = [fault for attempt in scenario.attempts for fault in attempt.faults]
    return faults[0].point if len(faults) == 1 else "sequences"


if __name__ == "__main__":
    sys.exit(main())
