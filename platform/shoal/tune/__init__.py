"""Sweeps: search a recipe's fields with Optuna, side by side on Ray Tune, ending the worse trials early.

Importing this loads none of ray, optuna, torch and pandas.
"""

from shoal.tune.options import SweepOptions
from shoal.tune.record import SweepRecord, Trial, TrialState
from shoal.tune.space import Space, check_space, choice, loguniform, parse_space, randint, uniform
from shoal.tune.start import start_sweep
from shoal.tune.sweep import Sweep, open_sweep

__all__ = [
    "Space",
    "Sweep",
    "SweepOptions",
    "SweepRecord",
    "Trial",
    "TrialState",
    "check_space",
    "choice",
    "loguniform",
    "open_sweep",
    "parse_space",
    "randint",
    "start_sweep",
    "uniform",
]
