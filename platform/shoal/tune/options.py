"""How a sweep is asked for: its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from shoal.train.option_rules import Rule, check, is_amount, one_of, refuse, whole_number
from shoal.train.options import RULES as RUN_RULES
from shoal.train.options import RunOptions
from shoal.tune.record import MAX_TRIALS

if TYPE_CHECKING:
    from shoal.train.spec import Precision

SchedulerKind = Literal["asha", "pbt", "none"]

RULES = {
    **RUN_RULES,
    "trials": Rule(whole_number(1, MAX_TRIALS), f"a whole number from 1 to {MAX_TRIALS}, such as 16"),
    "concurrent": Rule(whole_number(1), "a whole number, 1 or more, such as 4"),
    "workers": Rule(whole_number(1), "of each trial; a whole number, 1 or more, such as 2"),
    "scheduler": Rule(one_of(*get_args(SchedulerKind)), "'asha', 'pbt' or 'none'"),
    "perturb_every": Rule(whole_number(1), "a whole number of steps, 1 or more, such as 100"),
    "cpus_per_worker": Rule(is_amount, "a number, 0 or more, such as 1"),
    "gpus_per_worker": Rule(is_amount, "a number, 0 or more, such as 1"),
    "retries": Rule(whole_number(0), "a whole number, 0 or more, such as 3"),
}


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How a sweep is to run.

    Raises:
        RequestError: values that cannot be, alone or together; says of each what would.
    """

    trials: int | None = None
    """How many, 1 to 999; of a population its size. None: the file's. May grow when the sweep is gone on with."""
    concurrent: int | None = None
    """How many at a time, at most; fewer where fewer fit. None: the file's."""
    workers: int = 1
    """Of each trial; it starts when there is room for all of them, and holds that until it ends."""
    steps: int | None = None
    """Of each trial. None: the recipe's ``steps``."""
    name: str | None = None
    """None: ``<recipe>-sweep-<8 hex>`` of everything that makes it this search."""
    seed: int = 0
    """Of the search and of every trial's run."""
    precision: Precision = "fp32"
    """Of the forward pass."""
    checkpoint_every: float | str | None = None
    """The most work a crash can cost a trial, in seconds or as ``"30s"``. None: the file's."""
    scheduler: SchedulerKind = "asha"
    """Who ends trials early: ``asha`` those that are worse than others at the same step, ``pbt`` the worst of a
    population, for a copy of one of the best with fields changed a little; ``none`` nobody."""
    perturb_every: int | None = None
    """With ``pbt``, steps between two comparisons of a trial, taken at the next evaluation. None: the evaluation
    nearest to a fifth of the steps."""
    cpus_per_worker: float = 1.0
    """What each worker holds; its torch threads are its whole CPUs."""
    gpus_per_worker: float | None = None
    """None: one where the file's pool for training and the cluster have them."""
    retries: int | None = None
    """How often a trial whose process dies is started again; with several workers, how often within an hour one that
    dies is replaced. None: the file's."""

    def __post_init__(self) -> None:
        check(self, RULES)
        problems = []
        if self.cpus_per_worker == 0 and self.gpus_per_worker == 0:
            problems.append(
                "cpus_per_worker=0, gpus_per_worker=0: a worker holds a CPU or a GPU, or part of one"
            )
        if self.perturb_every is not None and self.scheduler != "pbt":
            problems.append(
                f"perturb_every={self.perturb_every}: only scheduler='pbt' perturbs; leave it out"
            )
        if self.scheduler == "pbt" and self.workers > 1:
            problems.append(
                f"workers={self.workers}: the trials of a population have one worker each; leave workers out, or "
                "take another scheduler"
            )
        refuse(problems)

    def of_a_trial(self) -> RunOptions:
        """A trial's run, but for its name; of what is kept besides the best only the newest is of use."""
        return RunOptions(
            steps=self.steps,
            seed=self.seed,
            precision=self.precision,
            checkpoint_every=self.checkpoint_every,
            keep=1,
            keep_best=1,
            exact=False,
        )
