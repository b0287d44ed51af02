"""Target local: what the pools become on one machine, what is dropped, what can never run there."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_reading import LAPTOP, Read

from shoal.config import LocalPool, Machine, plan_local
from shoal.config.machine import _container_limits, _count_gpus
from shoal.errors import ConfigError

FILE = """
version: 1
name: x
pools:
  cpu: {nodes: 0..4, cpu: 8}
  gpu: {nodes: 0..2, cpu: 8, gpu: L4:2}
"""
GIB = 2**30


def test_every_pool_shares_this_machine(read: Read) -> None:
    plan = plan_local(read(FILE), Machine(num_cpus=6, memory_bytes=16 * GIB, num_gpus=0))
    assert (plan.num_cpus, plan.num_gpus, plan.memory_bytes) == (6, 0, 16 * GIB)
    assert plan.pools == {name: LocalPool(num_cpus=6, num_gpus=0) for name in ("cpu", "gpu")}
    assert plan.pools["gpu"].max_workers == 6


@pytest.mark.parametrize(
    ("gpus_here", "used", "notes"),
    [
        (0, 0, ("pools.gpu: up to 4 GPUs in the file, this machine has none: its workers run on CPUs",)),
        (1, 1, ("pools.gpu: up to 4 GPUs in the file, this machine has 1",)),
        (4, 4, ()),
        (8, 4, ()),
    ],
)
def test_gpus_that_the_machine_lacks_are_dropped_and_named(
    read: Read, gpus_here: int, used: int, notes: tuple[str, ...]
) -> None:
    plan = plan_local(read(FILE), Machine(num_cpus=6, memory_bytes=GIB, num_gpus=gpus_here))
    assert (plan.num_gpus, plan.notes) == (used, notes)
    assert plan.pools["gpu"].max_workers == (used or 6)
    assert plan.pools["cpu"].num_gpus == 0


def test_logical_cpus_may_exceed_the_machine_and_it_says_so(read: Read) -> None:
    plan = plan_local(
        read(FILE.replace("L4:2", "1"), overrides=["targets.local.cpu=4"]),
        Machine(num_cpus=2, memory_bytes=GIB, num_gpus=2),
    )
    assert plan.num_cpus == 4
    assert plan.notes == ("targets.local.cpu: 4 logical CPUs share the 2 of this machine",)


def test_a_range_beyond_this_machine_is_fine_and_named(read: Read) -> None:
    plan = plan_local(
        read(FILE, overrides=["train.workers=1..32"]), Machine(num_cpus=2, memory_bytes=GIB, num_gpus=4)
    )
    assert plan.notes == ("train.workers: 1..32 asked for, at most 2 fit on this machine",)


def test_no_pools_at_all(read: Read) -> None:
    plan = plan_local(read("version: 1\nname: x"), Machine(num_cpus=2, memory_bytes=GIB, num_gpus=1))
    assert (plan.num_cpus, plan.num_gpus, plan.pools, plan.notes) == (2, 0, {}, ())


def test_a_gpu_pool_without_gpus_holds_its_workers_on_cpus(read: Read) -> None:
    assert read(FILE, overrides=["train={pool: gpu, workers: 2}"]).train.workers.min == 2
    with pytest.raises(ConfigError, match="3 workers can never run: target local has 2 CPUs"):
        read(FILE, overrides=["train={pool: gpu, workers: 3}"])
    one_gpu = Machine(num_cpus=8, memory_bytes=GIB, num_gpus=1)
    with pytest.raises(ConfigError, match="2 workers can never run: pool gpu on this machine has 1 GPU,"):
        read(FILE, overrides=["train={pool: gpu, workers: 2}"], machine=one_gpu)


def test_a_cpu_pool_does_not_count_the_gpus_of_another(read: Read) -> None:
    one_gpu = Machine(num_cpus=4, memory_bytes=GIB, num_gpus=1)
    assert read(FILE, overrides=["train={pool: cpu, workers: 4}"], machine=one_gpu).train.workers.min == 4


def test_gpus_are_counted_without_a_gpu_library(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    seen = {
        visible: _count_gpus({"CUDA_VISIBLE_DEVICES": visible}, tmp_path)
        for visible in ("", "-1", "1", "0,1,2")
    }
    assert seen == {"": 0, "-1": 0, "1": 1, "0,1,2": 2}
    assert _count_gpus({}, tmp_path) == 2


def test_container_limits_count(tmp_path: Path) -> None:
    assert _container_limits(tmp_path) == (None, None)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_limits(tmp_path) == (None, None)
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert _container_limits(tmp_path) == (2, GIB)


def test_this_machine_has_something() -> None:
    here = Machine.here()
    assert here.num_cpus >= 1
    assert here.memory_bytes > LAPTOP.memory_bytes / 100
