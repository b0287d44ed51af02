"""Sum gradients over workers in a layout that never changes, overlapped with the backward pass.

Why not torch's DistributedDataParallel: it rearranges its buckets after its first backward, so a resumed
run adds in another order than the run it continues. From 3 workers on the weights then differ in their
last bits (measured on gloo, 3 and 4 workers; pytorch 2.13). Here the layout is a function of the model alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import nn

from shoal.errors import RecipeError
from shoal.train.exchange import Exchange, Pending
from shoal.train.pulse import heart

BUCKET_BYTES = 25 * 2**20
"""Size at which a bucket is sent while the backward pass goes on; DDP's default (Li et al., VLDB 2020)."""


class Wishes(NamedTuple):
    """What is to happen at the end of a step; what one rank wishes, all do."""

    checkpoint: bool = False
    stop: bool = False
    """Commit, and end the run."""
    resize: bool = False
    """Commit, and let another number of workers go on."""
    give_up: bool = False
    """Take no step: a rank could not compute its part of it."""
    tell: bool = False
    """Tell each other of samples that cannot be loaded."""


NUM_CONTROL = 1 + len(Wishes._fields)
"""Control words that ride with the last gradients: the loss, and the wishes."""


def add_control(control: torch.Tensor, loss: torch.Tensor, wishes: Wishes) -> None:
    """Add one part's loss and wishes to the ``NUM_CONTROL`` words that are summed over ranks."""
    control[0].add_(loss.detach())
    for word, is_wished in enumerate(wishes, start=1):
        if is_wished:
            control[word].add_(1.0)


def read_control(control: torch.Tensor) -> tuple[float, Wishes]:
    """The sum of the losses, and what any rank wished. Blocks until the device has it."""
    with heart.waiting:  # on a GPU the collectives have only been queued so far
        loss, *words = control.tolist()
    return loss, Wishes(*(word > 0 for word in words))


class _Bucket:
    """One flat buffer whose slices become the gradients of some parameters of one dtype, and riders behind them."""

    def __init__(
        self,
        params: list[nn.Parameter],
        num_extra: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        multiple: int,
    ) -> None:
        size = sum(p.numel() for p in params)
        self.flat = torch.zeros(-(-(size + num_extra) // multiple) * multiple, dtype=dtype, device=device)
        self.gradients = self.flat[:size]
        self.extra = self.flat[size : size + num_extra]
        self.views = {}
        offset = 0
        for p in params:
            self.views[p] = self.flat[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        self.waiting = set(params)
        """Those whose gradient of the part under way is not there yet."""
        self.saved: list[torch.Tensor] = []
        """Sums of this step's earlier parts that are not to be added to ``flat`` yet."""
        self._spare: list[torch.Tensor] = []

    def begin(self) -> None:
        """Make ready for the gradients of a part.

        There are none yet: autograd then hands over its own tensor, and copying that once is half the memory traffic
        of adding it to a buffer of zeros.
        """
        self.extra.zero_()
        self.waiting = set(self.views)
        for p in self.views:
            p.grad = None

    def take(self, p: torch.Tensor) -> None:
        """Make the gradient of ``p`` a slice of the buffer; zero if the part did not use it."""
        view = self.views[p]  # type: ignore[index]
        if p.grad is None or p.grad.is_sparse:
            view.zero_()
        if p.grad is not None:
            view.add_(p.grad) if p.grad.is_sparse else view.copy_(p.grad)
        p.grad = view
        self.waiting.remove(p)  # type: ignore[arg-type]

    def end(self, num_additions: int, *, is_last: bool) -> None:
        """Add what the tree adds once the part's gradients are there, and put it aside unless it is sent now.

        At once: between two batches a loop may set ``p.grad``, this very memory, to zero.
        """
        for _ in range(num_additions):
            earlier = self.saved.pop()
            self.flat.add_(earlier)
            self._spare.append(earlier)
        if not is_last:
            into = self._spare.pop() if self._spare else torch.empty_like(self.flat)
            self.saved.append(into.copy_(self.flat))

    def release(self) -> None:
        """What was saved has been added up elsewhere."""
        self._spare += self.saved
        self.saved = []


class GradientBuckets:
    """All gradients of a model as a few flat buffers, summed over the group.

    Use, per step and part of it: `begin`, `set_control`, backward (hooks send full buckets as they fill), `end`;
    after the last part `finish`. Then every ``p.grad`` holds the sum over all parts of all ranks.

    Buckets are sent in one fixed order on every rank, so parameters that a batch does not use (their
    gradient is zero) cannot make ranks disagree.

    Args:
        additions: of each part of a step, how many sums put aside are added to it (`tree.additions_of`).
        exchange: how that is summed over ranks.
        riders: how many further numbers, by dtype, are summed along; see ``rider``.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        additions: tuple[int, ...],
        exchange: Exchange,
        *,
        device: torch.device,
        riders: Mapping[torch.dtype, int] | None = None,
    ) -> None:
        self._additions = additions
        self._index = 0
        self._exchange = exchange
        self._trained = trained = [p for p in params if p.requires_grad]
        # The loss is summed in float32 whatever the model's precision, in a buffer of its own if it must.
        extra = dict(riders or {})
        extra[torch.float32] = NUM_CONTROL + extra.get(torch.float32, 0)
        # Reversed: the last layers' gradients are ready first.
        groups = _split(list(reversed(trained)))
        dtype_of_last = groups[-1][0].dtype if groups else None
        kinds = [(ps, 0, ps[0].dtype) for ps in groups[:-1]]
        if dtype_of_last is not None:
            kinds.append((groups[-1], extra.pop(dtype_of_last, 0), dtype_of_last))
        kinds += [([], size, dtype) for dtype, size in extra.items()]
        self._buckets = [
            _Bucket(ps, size, dtype=dtype, device=device, multiple=exchange.multiple)
            for ps, size, dtype in kinds
        ]
        carriers = {bucket.flat.dtype: bucket.extra for bucket in self._buckets if bucket.extra.numel()}
        self._control = carriers[torch.float32][:NUM_CONTROL]
        self._num_before_control = max(
            index
            for index, b in enumerate(self._buckets)
            if b.extra.numel() and b.flat.dtype == torch.float32
        )
        self.rider = {**carriers, torch.float32: carriers[torch.float32][NUM_CONTROL:]}
        """By dtype, a buffer to *add* to between `begin` and backward; after `finish` it holds the sum."""
        self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.views}
        self._num_done = 0
        self._pending: list[Pending] = []
        # One part of one worker has nothing to send or to put aside: there is no need to watch it, or to copy what it
        # has. But sparse gradients, and parameters that a batch does not use, are treated alike on any number of
        # workers.
        watched = trained if exchange.is_remote or len(additions) > 1 else []
        self._hooks = [p.register_post_accumulate_grad_hook(self._on_ready) for p in watched]  # type: ignore[no-untyped-call]

    def begin(self, index: int) -> None:
        """Drop every ``p.grad``, ready for the ``index``-th part of this rank."""
        self._index = index
        self._num_done = 0
        if index == 0:
            self._pending = []
            for bucket in self._buckets:
                bucket.release()  # of a step that a loop broke off
        for bucket in self._buckets:
            bucket.begin()

    def set_control(self, loss: torch.Tensor, wishes: Wishes) -> None:
        """What this part adds to the control words; call it before the backward pass."""
        add_control(self._control, loss, wishes)

    def end(self) -> None:
        """The part's backward pass is over: parameters that it did not use have the gradient zero."""
        for bucket in self._buckets[self._num_done :]:
            for p in [p for p in bucket.waiting if self._hooks or p.grad is None or p.grad.is_sparse]:
                bucket.take(p)
            self._take_next()

    def finish(self) -> tuple[float, Wishes]:
        """Wait for the sum over ranks, and return that of the losses and what any rank wished."""
        pending, self._pending = self._pending, []
        self._exchange.finish(pending)
        for bucket in self._buckets:
            bucket.release()
        return read_control(self._control)

    def give_up(self) -> bool:
        """Take part in the sum of a step that this rank cannot compute, and tell the others; blocks as `finish` does.

        Needs no memory. False, with nothing done, if all that could tell them is on its way already.
        """
        if not self._exchange.is_remote:
            return True
        if len(self._pending) > self._num_before_control:
            return False
        unsent = self._buckets[len(self._pending) :]
        for bucket in unsent:
            bucket.flat.zero_()
        self._control[1 + Wishes._fields.index("give_up")].fill_(1.0)
        self._pending += [self._exchange.start(bucket.flat, []) for bucket in unsent]
        self.finish()
        return True

    def are_finite(self) -> bool:
        """After `finish`: whether no summed gradient is NaN or infinite. The same on every rank, as the sums are."""
        if self._hooks:
            parts = [bucket.gradients for bucket in self._buckets if bucket.views]
        else:
            parts = [p.grad for p in self._trained if p.grad is not None]
        if not parts:
            return True
        # One pass over each: a finite sum has finite parts. One that overflowed is looked at again.
        total = torch.stack([part.sum().float() for part in parts]).sum()
        return bool(torch.isfinite(total)) or all(bool(torch.isfinite(part).all()) for part in parts)

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _on_ready(self, p: torch.Tensor) -> None:
        bucket = self._bucket_of[p]  # type: ignore[index]
        if p not in bucket.waiting:  # its bucket may be under way, or its sum grouped in another way
            raise RecipeError(
                "a parameter got its gradient twice for one batch; session.backward(loss) must be the batch's only "
                "backward pass, and checkpoints of activations whose parameters are shared take use_reentrant=False"
            )
        bucket.take(p)
        while self._num_done < len(self._buckets) and not self._buckets[self._num_done].waiting:
            self._take_next()

    def _take_next(self) -> None:
        bucket = self._buckets[self._num_done]
        self._num_done += 1
        is_last = self._index == len(self._additions) - 1
        bucket.end(self._additions[self._index], is_last=is_last)
        if is_last:
            self._pending.append(self._exchange.start(bucket.flat, bucket.saved))


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
