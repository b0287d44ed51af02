"""Sum gradients over workers in a layout that never changes, overlapped with the backward pass.

Why not torch's DistributedDataParallel: it rearranges its buckets after its first backward, so a resumed
run adds in another order than the run it continues. From 3 workers on the weights then differ in their
last bits (measured on gloo, 3 and 4 workers; pytorch 2.13). Here the layout is a function of the model alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from shoal.train.group import Group

BUCKET_BYTES = 25 * 2**20
"""Size at which a bucket is sent while the backward pass goes on; DDP's default (Li et al., VLDB 2020)."""

NUM_CONTROL = 3
"""Control words that ride with the last gradients: loss, wish to checkpoint, wish to stop."""


class _Bucket:
    """One flat buffer whose slices are the gradients of some parameters of one dtype."""

    def __init__(self, params: list[nn.Parameter], num_extra: int) -> None:
        size = sum(p.numel() for p in params)
        self.flat = torch.zeros(size + num_extra, dtype=params[0].dtype, device=params[0].device)
        self.extra = self.flat[size:]
        self.views = {}
        offset = 0
        for p in params:
            self.views[p] = self.flat[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        self.num_waiting = len(params)


class GradientBuckets:
    """All gradients of a model as a few flat buffers, summed over the group.

    Use, once per step: `zero`, backward (hooks send full buckets as they fill), `finish`. After `finish`
    every ``p.grad`` holds the sum over ranks, and `finish` returns the control words' sums.

    Buckets are sent in one fixed order on every rank, so parameters that a batch does not use (their
    gradient is zero) cannot make ranks disagree.
    """

    def __init__(self, params: Iterable[nn.Parameter], group: Group) -> None:
        self._group = group
        trained = [p for p in params if p.requires_grad]
        # Reversed: the last layers' gradients are ready first.
        self._buckets = [_Bucket(ps, 0) for ps in _split(list(reversed(trained)))]
        # The loss is summed in float32 whatever the model's precision, in a buffer of its own if it must.
        last = self._buckets[-1] if self._buckets else None
        if last is not None and last.flat.dtype == torch.float32:
            self._buckets[-1] = last = _Bucket(list(last.views), NUM_CONTROL)
            self._control, self._control_apart = last.extra, False
        else:
            self._control = torch.zeros(NUM_CONTROL, device=group.device)
            self._control_apart = True
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.views}
        self._work: list[torch.distributed.Work | None] = []
        # One worker has nothing to send; its gradients are the buffers' slices all the same, so that parameters
        # a batch does not use are treated alike (a zero gradient) on any number of workers.
        watched = trained if group.size > 1 else []
        self._hooks = [p.register_post_accumulate_grad_hook(self._on_ready) for p in watched]  # type: ignore[no-untyped-call]

    def zero(self) -> None:
        """Set all gradients to zero and make every ``p.grad`` a slice of its buffer again."""
        self._work = []
        for bucket in self._buckets:
            bucket.flat.zero_()
            bucket.num_waiting = len(bucket.views)
            for p, view in bucket.views.items():
                p.grad = view

    def set_control(self, loss: torch.Tensor, wants_checkpoint: bool, wants_stop: bool) -> None:
        """What this rank adds to the control words; call it before the backward pass."""
        self._control[0] = loss.detach()
        self._control[1] = float(wants_checkpoint)
        self._control[2] = float(wants_stop)

    def finish(self) -> list[float]:
        """Send what is left, wait for all, and return the control words summed over ranks."""
        while len(self._work) < len(self._buckets):
            self._send_next()
        if self._control_apart:
            self._work.append(self._group.start_sum(self._control))
        for work in self._work:
            self._group.finish(work)
        return self._control.tolist()

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _on_ready(self, p: torch.Tensor) -> None:
        bucket = self._bucket_of[p]  # type: ignore[index]
        view = bucket.views[p]  # type: ignore[index]
        if p.grad is not None and p.grad.data_ptr() != view.data_ptr():
            view.copy_(p.grad)  # somebody set the gradient to None; autograd then made a tensor of its own
            p.grad = view
        bucket.num_waiting -= 1
        while len(self._work) < len(self._buckets) and self._buckets[len(self._work)].num_waiting == 0:
            self._send_next()

    def _send_next(self) -> None:
        self._work.append(self._group.start_sum(self._buckets[len(self._work)].flat))


def _split(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Runs of parameters of one dtype and device, each of about `BUCKET_BYTES`."""
    buckets: list[list[nn.Parameter]] = []
    size = 0
    for p in params:
        same_kind = buckets and (buckets[-1][0].dtype, buckets[-1][0].device) == (p.dtype, p.device)
        if not same_kind or size >= BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += p.numel() * p.element_size()
    return buckets
