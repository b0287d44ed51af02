"""Parameters, gradients and optimizer state divided among the workers: torch's `fully_shard`, under the same session.

``fsdp`` divides over all workers; ``hybrid`` within each machine, and keeps the machines' copies equal, so that only
gradients cross the network. A worker then holds ``1/n`` of the state, and gathers the parameters of a block when that
block runs (Zhao et al., "PyTorch FSDP", VLDB 2023). A checkpoint holds whole tensors under the same names as one of
``ddp``, so a run goes on under any strategy; only the grouping of sums differs, as between numbers of workers.

Imported only where something is divided: torch's part of it takes a while to load.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from shoal.train.group import Group
from shoal.train.reduce import NUM_CONTROL, Wishes, add_control, read_control
from shoal.train.spec import Strategy


def shard_model(model: nn.Module, group: Group, strategy: Strategy) -> DeviceMesh:
    """Divide the model's parameters among the workers, in place. Blocks; every rank must hold the same weights.

    What is gathered together is one element of an ``nn.ModuleList`` or ``nn.Sequential``, such as a transformer's
    block, and then the rest. Each is gathered when it is *called*; ``model.encode(x)`` beside ``forward`` needs
    ``torch.distributed.fsdp.register_fsdp_forward_method``. `release` it in the end.
    """
    mesh = mesh_of(group, strategy)
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The session weighs each worker's loss by its share of the batch, so the sum is wanted and not the mean;
            # gloo has no sum with a factor, which is what torch takes otherwise.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return mesh


def release(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let go of the process groups; the model is not to be run any more.

    They end when nobody holds them: only then do peers that wait for this rank fail, and their threads stop. torch's
    caches keep the mesh for ever, and whoever handles an exception keeps the model. A group of the same ranks that is
    made later is found by its name.
    """
    mesh._pg_registry.clear()
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for params in module._get_fsdp_state()._fsdp_param_groups:
                for info in filter(None, (params.mesh_info, params.post_forward_mesh_info)):
                    for name in [name for name in vars(info) if name.endswith("_process_group")]:
                        setattr(info, name, None)


def mesh_of(group: Group, strategy: Strategy) -> DeviceMesh:
    """Over which ranks parameters are divided, and over which they are copied. Blocks.

    Where machines have different numbers of a hybrid run's workers, it divides over as many as every machine has a
    multiple of.
    """
    if strategy == "fsdp":
        return DeviceMesh(group.device.type, list(range(group.size)), mesh_dim_names=("shard",))
    rows = rows_of(group.gather(socket.gethostname()))
    return DeviceMesh(group.device.type, rows, mesh_dim_names=("replicate", "shard"))


def rows_of(machines: list[str]) -> list[list[int]]:
    """Ranks in rows of equal length, each within one of the ``machines``, which are given by rank."""
    ranks_of: dict[str, list[int]] = {}
    for rank, machine in enumerate(machines):
        ranks_of.setdefault(machine, []).append(rank)
    width = math.gcd(*map(len, ranks_of.values()))
    return [ranks[i : i + width] for ranks in ranks_of.values() for i in range(0, len(ranks), width)]


def load_model(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """``model.load_state_dict`` with whole tensors. Every rank has them all, and keeps its part; no messages.

    Raises:
        RuntimeError: they do not fit the model.
    """
    own = model.state_dict()
    divided = {name: _like(own[name], t) if name in own else t for name, t in tensors.items()}
    model.load_state_dict(divided)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict`` with whole tensors, of which every rank keeps its part.

    Raises:
        ValueError: the optimizer has other parameters.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = [name for group in state["param_groups"] for name in group["params"]]
    of_name = dict(zip(names, params, strict=True))
    divided = {
        name: {key: _like(of_name[name], value) for key, value in values.items()}
        for name, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": divided})


def _like(own: Any, whole: Any) -> Any:
    """This rank's part of ``whole``, if it has the shape of a divided tensor; else ``whole``."""
    if not (isinstance(own, DTensor) and isinstance(whole, torch.Tensor) and own.shape == whole.shape):
        return whole
    whole = whole.to(own.device)
    return distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost elements of module lists that have parameters."""
    for child in module.children():
        is_list = isinstance(module, nn.ModuleList | nn.Sequential)
        if not is_list:
            yield from _blocks(child)
        elif isinstance(child, nn.ModuleList):
            yield from _blocks(child)  # never called itself
        elif any(True for _ in child.parameters()):
            yield child


class ShardedGradients:
    """The `session.Gradients` of a divided model: torch sums the gradients, the loss and the rest go along here."""

    def __init__(
        self, model: nn.Module, group: Group, *, num_parts: int, riders: Mapping[torch.dtype, int]
    ) -> None:
        self._params = list(model.parameters())
        self._index, self._last = 0, num_parts - 1
        self._group = group
        sizes = {**riders, torch.float32: NUM_CONTROL + riders.get(torch.float32, 0)}
        self._carriers = {
            dtype: torch.zeros(size, dtype=dtype, device=group.device) for dtype, size in sizes.items()
        }
        self._control = self._carriers[torch.float32][:NUM_CONTROL]
        self.rider = {**self._carriers, torch.float32: self._carriers[torch.float32][NUM_CONTROL:]}
        self._pending: list[torch.distributed.Work | None] = []

    def begin(self, index: int) -> None:
        self._index = index
        if index > 0:
            return  # torch adds a later part's gradients to an earlier one's
        for carrier in self._carriers.values():
            carrier.zero_()
        for p in self._params:
            p.grad = None

    def set_control(self, loss: torch.Tensor, wishes: Wishes) -> None:
        add_control(self._control, loss, wishes)

    def end(self) -> None:
        if self._index < self._last:
            return
        self._pending = [self._group.start_sum(carrier) for carrier in self._carriers.values()]

    def finish(self) -> tuple[float, Wishes]:
        for work in self._pending:
            self._group.finish(work)
        return read_control(self._control)

    def give_up(self) -> bool:
        """Never: the other ranks wait inside the model, where nobody can tell them."""
        return False

    def are_finite(self) -> bool:
        parts = [p.grad.to_local() for p in self._params if isinstance(p.grad, DTensor)]
        num_bad = sum((~torch.isfinite(part)).sum() for part in parts)
        found = torch.as_tensor(num_bad, device=self._group.device).clone()
        self._group.sum(found)  # each rank sees its part alone
        return not found.item()

    def close(self) -> None:
        pass
