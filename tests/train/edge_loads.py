"""What `test_train_ray_edge.py` runs on workers: in a module of its own, so that it travels by name."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from shoal.errors import PeerLost, RecipeError


def note(config: dict[str, Any], **fields: Any) -> None:
    """Append one line to this rank's file."""
    path = Path(config["notes"]) / f"rank-{os.environ['RANK']}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), **fields}) + "\n")


def sum_ranks(config: dict[str, Any]) -> None:
    """Note what the collective gave, and what this process listens on."""
    import psutil
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    listens = [
        connection.laddr.ip
        for connection in psutil.Process().net_connections("inet")
        if connection.status == "LISTEN"
    ]
    note(
        config,
        total=total.item(),
        backend=dist.get_backend(),
        world=dist.get_world_size(),
        listens=listens,
        local_rank=os.environ["LOCAL_RANK"],
        omp=os.environ.get("OMP_NUM_THREADS"),
    )


def step_until_told(config: dict[str, Any]) -> None:
    """Keep doing collectives until the file ``finish`` is there."""
    import torch
    import torch.distributed as dist

    flag = torch.zeros(1)
    for step in range(1_000_000):
        flag.fill_(float((Path(config["notes"]) / "finish").exists()))
        dist.broadcast(flag, 0)
        if step == 0:
            note(config, started=time.time(), local_rank=os.environ["LOCAL_RANK"])
        if flag:
            return
        time.sleep(0.01)


def refuse(config: dict[str, Any]) -> None:
    """Fail on rank 1 with an error that means something, and leave; rank 0 says that it lost a peer."""
    import torch
    import torch.distributed as dist

    note(config, refused=True)
    if dist.get_rank() == 1:
        dist.destroy_process_group()
        raise RecipeError("the loss is NaN", traceback_text="in the recipe")
    try:
        dist.all_reduce(torch.zeros(1))
    except RuntimeError as err:
        raise PeerLost("gone") from err


def stumble(config: dict[str, Any]) -> None:
    """Fail every time with an error that means nothing to shoal."""
    note(config, stumbled=True)
    raise OSError("no such thing")


def step_with_peers(config: dict[str, Any]) -> None:
    """As `step_until_told`, but a lost peer is said to be one, as shoal's own collectives do."""
    try:
        step_until_told(config)
    except RuntimeError as err:
        raise PeerLost("gone") from err


def lose_peers(config: dict[str, Any]) -> None:
    """Every worker says that it lost the others."""
    note(config, lost=True)
    raise PeerLost("gone")


def die_late(config: dict[str, Any]) -> None:
    """Rank 1 dies, the first time, when rank 0 has returned."""
    note(config, came=True)
    if os.environ["RANK"] == "1" and len(Path(config["notes"], "rank-1.jsonl").read_text().splitlines()) == 1:
        while not (Path(config["notes"]) / "die").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
