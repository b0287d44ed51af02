"""Runs and the registry: the record on storage, and MLflow as a view of it.

Importing this loads neither MLflow nor Ray nor pandas.
"""

from shoal.tracking.journal import Event, Folded, RunState, derive_state
from shoal.tracking.record import RunRecord, check_run_name, list_runs

__all__ = ["Event", "Folded", "RunRecord", "RunState", "check_run_name", "derive_state", "list_runs"]
