"""Options that several commands share, each written once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Target = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Where it runs: `local`. Default: `target` in cluster.yaml."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override one value of cluster.yaml; repeat for more."),
]
Fields = Annotated[
    list[str] | None, typer.Argument(metavar="FIELD=VALUE", help="The recipe's fields, such as lr=1e-3.")
]
SpaceFields = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FIELD=SPACE",
        help="What to search: lr=log:1e-4..1e-1 by orders of magnitude, dropout=0.0..0.5 evenly, layers=1..4 "
        "whole numbers, hidden=64,128 one of these; wd=1e-2 is fixed.",
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        metavar="N|N..M", help="Workers; of a range, as many as are free, now and later. Default: the file's."
    ),
]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Where the run ends. Default: the recipe's.")]
Name = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Default: <recipe>-<8 hex>; the same command, the same run."),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Of weights, data order and dropout.")]
Precision = Annotated[Literal["fp32", "bf16"], typer.Option(metavar="fp32|bf16", help="Of the forward pass.")]
CheckpointEvery = Annotated[
    str | None,
    typer.Option(
        metavar="TIME", help="The most work a crash can cost, such as 30s; or auto. Default: the file's."
    ),
]
Keep = Annotated[
    int | None,
    typer.Option(metavar="N", help="Newest checkpoints to keep besides the best. Default: the file's."),
]
KeepBest = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Best checkpoints to keep, by the recipe's objective. Default: the file's."
    ),
]
Exact = Annotated[
    bool | None,
    typer.Option(
        "--exact/--no-exact",
        help="The same weights, bit for bit, on any number of workers. Default: the file's.",
    ),
]
Shards = Annotated[
    int | None,
    typer.Option(metavar="N", help="Of an exact run: parts of each batch, at most as many workers."),
]
MicroBatch = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Samples at a time, at most; the rest of a batch by accumulation. Default: all."
    ),
]
Strategy = Annotated[
    Literal["ddp", "fsdp", "hybrid"] | None,
    typer.Option(
        metavar="ddp|fsdp|hybrid",
        help="Each worker holds the whole state, or its part of all, or of its machine's. Default: the file's.",
    ),
]
OnNan = Annotated[
    Literal["fail", "skip", "rollback"] | None,
    typer.Option(
        metavar="fail|skip|rollback",
        help="At a NaN loss: fail, skip the batch, or skip it from the last checkpoint on. Default: the file's.",
    ),
]
InitFrom = Annotated[
    str | None, typer.Option(metavar="MODEL", help="A model version to start from, such as digits@1.")
]
Detach = Annotated[
    bool, typer.Option("--detach", help="Let the cluster drive the run; return once it has started.")
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Build everything, take one step here, say what it would need; write nothing."
    ),
]
Trials = Annotated[int | None, typer.Option(metavar="N", help="Trials of the sweep. Default: the file's.")]
Concurrent = Annotated[
    int | None, typer.Option(metavar="N", help="Trials at a time, at most. Default: the file's.")
]
TrialWorkers = Annotated[int, typer.Option("--workers", metavar="N", help="Workers of each trial.")]
SweepName = Annotated[
    str | None,
    typer.Option(
        "--name", metavar="NAME", help="Default: <recipe>-sweep-<8 hex>; the same command, the same sweep."
    ),
]
Scheduler = Annotated[
    Literal["asha", "pbt", "none"],
    typer.Option(
        metavar="asha|pbt|none",
        help="asha ends trials early that are worse than others at the same step; pbt replaces the worst by "
        "copies of the best with fields changed a little, of as many trials as run side by side.",
    ),
]
PerturbEvery = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With pbt: steps between comparisons of a trial. Default: about a fifth of its steps.",
    ),
]
