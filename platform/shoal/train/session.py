"""What a training loop talks to: batches in, gradients summed, steps taken, metrics out.

A session knows its process group and nothing of Ray; the same code runs in one process, under torchrun
and on Ray Train.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from shoal.errors import RecipeError
from shoal.recipe import Datasets, Recipe
from shoal.train.bad_steps import OnNan
from shoal.train.buffers import Buffers
from shoal.train.group import Group
from shoal.train.loader import batch_length, evaluation_loader, load_again, to_device, training_loader
from shoal.train.order import DataOrder
from shoal.train.out_of_memory import StepGivenUp, halved, is_out_of_memory, largest_part, num_parts
from shoal.train.pulse import heart
from shoal.train.quarantine import BadSample, Quarantine
from shoal.train.reduce import GradientBuckets, Wishes
from shoal.train.scheme import exact, fast
from shoal.train.seeds import derive_seed, seed_everything
from shoal.train.spec import Precision, Strategy
from shoal.train.tree import share_of

logger = logging.getLogger(__name__)


class Boundary(Protocol):
    """What happens between steps: record, evaluate, checkpoint. The engine's side of a session."""

    def wishes(self) -> Wishes:
        """What this rank wishes for the end of the step under way."""
        ...

    def before_update(self) -> None:
        """What is copied from parameters and optimizer must be copied now: they are about to change."""
        ...

    def after_step(self, session: Session, wishes: Wishes) -> bool:
        """Do what is due at this boundary, where all ranks know what any wished; True ends the loop here."""
        ...

    def bad_sample(self, bad: BadSample) -> None:
        """Record, on the rank that found it, that another sample takes the place of this one."""
        ...

    def bad_step(self, step: int, samples: list[int], reason: str) -> None:
        """Record on every rank that the update of ``step`` is left out; asked only where ``on_nan`` is not ``fail``.

        Raises:
            RecipeError: these are too many.
            BeginAgain: it is to be left out from the last checkpoint on.
        """
        ...


class Gradients(Protocol):
    """Sums gradients, and a few numbers with them, over the parts and workers of a step; see `GradientBuckets`."""

    rider: dict[torch.dtype, torch.Tensor]

    def begin(self, index: int) -> None: ...
    def set_control(self, loss: torch.Tensor, wishes: Wishes) -> None: ...
    def end(self) -> None: ...
    def finish(self) -> tuple[float, Wishes]: ...
    def give_up(self) -> bool: ...
    def are_finite(self) -> bool: ...
    def close(self) -> None: ...


@dataclass
class Progress:
    """Sums since the last line of metrics."""

    loss: float = 0.0
    num_steps: int = 0
    logged: dict[str, list[float]] | None = None
    since: float = 0.0


class Session:
    """One worker's view of a run.

    Attributes:
        model, optimizer, scheduler: as the recipe built them, on this worker's device.
        steps_done: completed steps; the next batch belongs to step ``steps_done`` (from 0).
        target_steps: where the run ends.
        group: rank, number of workers, device.
        left_out: steps that are completed without their batch.
        is_torn: whether weights and optimizer may be those of no step boundary: an update is under way.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Datasets,
        group: Group,
        boundary: Boundary,
        *,
        seed: int,
        target_steps: int,
        precision: Precision = "fp32",
        strategy: Strategy = "ddp",
        shards: int | None = None,
        on_nan: OnNan = "fail",
        micro_batch: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.recipe = recipe
        self.data = data
        self.group = group
        self.steps_done = 0
        self.target_steps = target_steps
        self.precision = precision
        self.left_out: Container[int] = ()
        self.is_torn = False
        self._is_sum_due = False
        """Whether the other ranks are to come to a step's sum next, so that one may give the step up there."""
        self._evaluation_batch = recipe.batch_size if micro_batch is None else micro_batch
        self._on_nan = on_nan
        self._boundary = boundary
        self._clock = clock
        self._progress = Progress(since=clock())
        if target_steps < 1:
            raise RecipeError(f"steps={target_steps}: a run has at least 1 step")
        if not isinstance(data, Datasets):
            raise RecipeError(
                f"build_data must return shoal.Datasets(train=, val=), not {type(data).__name__}"
            )
        num_train = _length(data.train, "train")
        _length(data.val, "val")
        if recipe.batch_size < group.size:
            raise RecipeError(
                f"batch_size={recipe.batch_size} cannot be divided among {group.size} workers; "
                f"raise batch_size or ask for at most {recipe.batch_size} workers"
            )
        self._seed = seed
        self._order = DataOrder(num_train, recipe.batch_size, derive_seed(seed, "order"))
        self.quarantine = Quarantine(
            num_train,
            recipe.batch_size,
            seed=derive_seed(seed, "quarantine"),
            tries=data.tries,
            tell=boundary.bad_sample,
        )
        seed_everything(derive_seed(seed, "init"))
        self.model: nn.Module = recipe.build_model().to(group.device)
        self._share_initial_weights()
        self.is_divided = strategy != "ddp" and group.size > 1
        """Whether each worker holds only a part of parameters and optimizer state."""
        if self.is_divided:
            from shoal.train.sharded import shard_model

            self._mesh = shard_model(self.model, group, strategy)
        self.optimizer = recipe.build_optimizer(self.model)
        self.scheduler = recipe.build_scheduler(self.optimizer)
        self._num_parts = num_parts(recipe.batch_size, group.size, micro_batch)
        self._scheme = fast(group, self._num_parts) if shards is None else exact(self.model, group, shards)
        self._buffers = Buffers(self.model, self._scheme.num_shards, rewinds=on_nan != "fail")
        self._seed_for("begin")
        self._gradients = self._build_gradients()
        self._phase = "step"
        self._part = 0

    # -- the loop's side -------------------------------------------------------------------------------

    def batches(self) -> Iterator[Any]:
        """This worker's share of each batch from the current step to the last, on its device.

        Ends early when the run is asked to stop, or to go on with another number of workers. Every batch must be
        followed by `backward` and `step`. In an exact run a worker's share comes in several batches, one per shard,
        and so it does where `micro_batch` divides it; `step` then takes a step after the last.

        Raises:
            RecipeError: a batch was taken without a `step` for the one before it.
        """
        scheme = self._scheme
        self._is_sum_due = True
        loaded = iter(self._loader())
        known = dict(self.quarantine.since)
        for step in range(self.steps_done, self.target_steps):
            if step in self.left_out:
                self._pass_over(Wishes())
                if self._ended:
                    return
                continue
            if known != self.quarantine.since:  # what was loaded ahead may hold samples that others found bad
                loaded, known = iter(self._loader()), dict(self.quarantine.since)
            for self._part, shard in enumerate(scheme.mine):
                self._seed_for("shard", step, shard)  # before it is loaded: augmentation may draw, too
                batch = self._next(loaded, step, shard)
                self._move("step", to="batch")
                # Not always: a loop may keep parts of a training model in eval mode, and it takes time.
                if not self.model.training:
                    self.model.train()
                self._gradients.begin(self._part)
                self._buffers.begin(self._part)
                self._is_within_step = True
                yield to_device(batch, self.group.device)
                if self._ended:
                    return

    def _next(self, loaded: Iterator[Any], step: int, shard: int) -> Any:
        try:
            return next(loaded)
        except Exception as err:
            is_dead = isinstance(err, RuntimeError) and "exited unexpectedly" in str(err)  # a loader process
            if is_dead or is_out_of_memory(err) or isinstance(err, StopIteration):
                raise
            logger.warning("step %d: a batch could not be loaded; trying its samples", step, exc_info=True)
        (batch,) = self._order.batches((step,), range(shard, shard + 1), self._scheme.num_shards)
        again = load_again(
            self.data,
            batch,
            self.quarantine,
            begin=lambda: self._seed_for("shard", step, shard),
            sample_seed=derive_seed(self._seed, "sample"),
        )
        if self.data.loader_workers > 0:  # this process draws nothing while others load
            self._seed_for("shard", step, shard)
        return again

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which a forward pass runs in the run's precision (nothing for fp32)."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.group.device.type, dtype=torch.bfloat16)

    def loss(self, batch: Any) -> torch.Tensor:
        """The recipe's loss of this worker's batch, in the run's precision."""
        with self.autocast():
            return self.recipe.loss(self.model, batch)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients of the global batch's mean loss, and begin to sum them over workers.

        ``loss`` is the mean over this worker's samples; it is weighed by their share of the batch.

        Raises:
            RecipeError: the loss is not a scalar tensor with a gradient; a second call for one batch (add
                the losses instead: the first sum may be under way already).
        """
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise RecipeError(
                f"the loss must be a scalar tensor, the mean over the batch; found {shape}. "
                "End it with .mean()"
            )
        if not loss.requires_grad:
            raise RecipeError("the loss does not depend on the model's parameters (it has no gradient)")
        self._move("batch", to="backward")
        weight = self._weight()
        loss = loss.reshape(()) * weight
        wishes = self._boundary.wishes() if self._part == 0 else Wishes()
        self._gradients.set_control(loss, wishes._replace(tell=self.quarantine.has_news))
        self.quarantine.has_news = False
        self._buffers.ride(self._gradients.rider, weight)
        loss.backward()  # type: ignore[no-untyped-call]
        self._gradients.end()

    def step(self, *, max_grad_norm: float | None = None) -> None:
        """Finish the sum, take an optimizer and scheduler step, and do what is due at the step boundary.

        Does nothing until this worker's last batch of the step. Blocks until every worker has come here.
        Evaluation and the copy for a checkpoint happen inside. ``max_grad_norm`` clips the summed gradient to
        that 2-norm and records the norm as ``grad_norm``; it cannot be clipped before, because until here each
        worker holds a part of the sum. Where the run's ``on_nan`` is not ``fail``, a step whose loss or gradients
        are NaN or infinite changes nothing but the schedule.

        Raises:
            RecipeError: the loss is NaN or infinite (the weights are still those of the step before).
            PeerLost: another worker is gone.
        """
        self._move("backward", to="step")
        if self._part < len(self._scheme.mine) - 1:
            return
        self._is_sum_due = False
        loss, wishes = self._gradients.finish()
        if wishes.give_up:
            raise StepGivenUp
        self._boundary.before_update()
        if wishes.tell:
            for since in self.group.gather(dict(self.quarantine.since)):
                self.quarantine.know(since)
        if reason := self._why_unusable(loss):
            self._leave_out(reason, wishes)
            return
        self._buffers.land(self._gradients.rider)
        self._seed_for("step", self.steps_done)  # what the optimizer draws must be the same on every worker
        if max_grad_norm is not None:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_grad_norm)
            self.log(grad_norm=norm.full_tensor() if self.is_divided else norm)  # type: ignore[attr-defined]
        self.is_torn = True
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.is_torn = False
        self.step_done(loss)
        self._end_step(wishes)

    def log(self, **values: float | torch.Tensor) -> None:
        """Record values of your own beside the loss; the mean over the steps since the last line is kept.

        Rank 0's values are recorded. Does not block. Called during a long pause of a loop, also without values, it
        tells the watchdog that this worker moves.
        """
        heart.beat()
        if not self.group.is_first:
            return
        if self._progress.logged is None:
            self._progress.logged = {}
        for name, value in values.items():
            self._progress.logged.setdefault(name, []).append(float(value))

    # -- the engine's side -----------------------------------------------------------------------------

    _ended = False
    _is_within_step = False

    def _move(self, expected: str, *, to: str) -> None:
        """Every batch goes batch, backward, step; anything else would corrupt the sum of gradients."""
        if self._phase != expected:
            raise RecipeError(
                f"session: {to} after {self._phase}; every batch of session.batches() takes one "
                "session.backward(loss) and then one session.step()"
            )
        self._phase = to

    def _why_unusable(self, loss: float) -> str:
        """Why the step's sums must not change the weights, or nothing. They are the same on every rank."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if self._on_nan != "fail" and not self._gradients.are_finite():
            return "a gradient is NaN or infinite"
        return ""

    def _leave_out(self, reason: str, wishes: Wishes) -> None:
        """End the step with the state that it began with."""
        if self._on_nan == "fail":
            raise RecipeError(
                f"step {self.steps_done}: {reason}; the weights are those before this step. Lower the learning rate, "
                "clip with session.step(max_grad_norm=...), look at the data, or go on without such batches: "
                "on_nan='skip' (--on-nan skip)"
            )
        self.rewind()
        self._boundary.bad_step(self.steps_done, self._order.samples(self.steps_done), reason)
        self._pass_over(wishes)

    def _pass_over(self, wishes: Wishes) -> None:
        """Complete a step without an update. The schedule goes on: it is a function of the step alone."""
        if self.scheduler is not None:
            with warnings.catch_warnings():  # of a schedule that is stepped before its optimizer ever was
                warnings.simplefilter("ignore", UserWarning)
                self.scheduler.step()
        self._count_step()
        self._end_step(wishes)

    def _end_step(self, wishes: Wishes) -> None:
        self._is_sum_due = False
        self._ended = self._boundary.after_step(self, wishes)
        self._is_sum_due = not self._ended and self.steps_done < self.target_steps

    @property
    def can_rewind(self) -> bool:
        """Whether `rewind` makes the state that of the last step boundary."""
        return not self.is_torn and (not self._is_within_step or self._buffers.can_rewind)

    @property
    def micro_batch(self) -> int:
        """The most samples that go through the model at a time while it trains."""
        return largest_part(self.recipe.batch_size, 1, self._scheme.num_shards)

    @property
    def smaller_micro_batch(self) -> int | None:
        """About half as many; None where they cannot be fewer."""
        return halved(self.recipe.batch_size, self.group.size, self._num_parts)

    def give_up_step(self) -> bool:
        """Tell the other ranks that this one cannot compute its part of the step; they give it up as well.

        Blocks until they have come to its sum. False, with nothing done, where that is over, or no step is under way.
        """
        return self._is_sum_due and self._gradients.give_up()

    def load_state(
        self, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, Any] | None = None
    ) -> None:
        """Take whole tensors as the model's, and an optimizer's state as the optimizer's.

        Raises:
            RuntimeError, ValueError, KeyError: they do not fit.
        """
        if self.is_divided:
            from shoal.train import sharded

            sharded.load_model(self.model, model)
            if optimizer is not None:
                sharded.load_optimizer(self.optimizer, optimizer)
            return
        self.model.load_state_dict(model)
        if optimizer is not None:
            self.optimizer.load_state_dict(dict(optimizer))

    def rewind(self) -> None:
        """Make the state that of the last step boundary again, when a lost peer ended the step under way.

        Parameters change after the last thing that can fail; what a forward pass changed are buffers.
        """
        if self._is_within_step:
            self._buffers.rewind()
            self._is_within_step = False

    def step_done(self, loss: float) -> None:
        """Count a completed step; ``loss`` is the mean over its whole batch."""
        self._progress.loss += loss
        self._progress.num_steps += 1
        self._count_step()

    def _count_step(self) -> None:
        self.steps_done += 1
        self._is_within_step = False
        heart.step(self.steps_done)

    def take_progress(self) -> dict[str, float] | None:
        """Mean loss, own values and rate since the last call; None if no step was taken since."""
        done, now = self._progress, self._clock()
        if done.num_steps == 0:
            return None
        self._progress = Progress(since=now)
        elapsed_s = max(now - done.since, 1e-9)
        values = {
            "loss": done.loss / done.num_steps,
            "samples_per_s": done.num_steps * self.recipe.batch_size / elapsed_s,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
        }
        return values | {name: sum(vs) / len(vs) for name, vs in (done.logged or {}).items()}

    @heart.during("evaluate")
    def evaluate(self, dataset: Dataset[Any]) -> dict[str, float]:
        """Mean loss and recipe metrics over a dataset, each worker measuring its share. Blocks; same on all."""
        was_training, was_sum_due = self.model.training, self._is_sum_due
        self._is_sum_due = False
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast():
                measured = [self._measure(dataset, shard) for shard in self._scheme.mine]
        finally:
            self.model.train(was_training)
            self._seed_for("evaluated", self.steps_done)  # workers drew as their shares are
        everywhere = self.group.gather(measured)
        self._is_sum_due = was_sum_due
        return _merge_means([part for parts in everywhere for part in parts])

    def _measure(self, dataset: Dataset[Any], shard: int) -> tuple[dict[str, float], int]:
        """Sums of loss and metrics over a shard's samples, and their number."""
        self._seed_for("evaluation", self.steps_done, shard)
        share = share_of(shard, self._scheme.num_shards, len(dataset))  # type: ignore[arg-type]
        sums: dict[str, float] = {}
        for batch in evaluation_loader(self.data, dataset, share, self._evaluation_batch):
            batch = to_device(batch, self.group.device)
            weight = batch_length(batch)
            found = {"loss": self.recipe.loss(self.model, batch)}
            found |= self.recipe.metrics(self.model, batch)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value) * weight
            heart.beat()
        if self.is_divided:
            self._keep_company(dataset, len(share))
        return sums, len(share)

    def _keep_company(self, dataset: Dataset[Any], num_measured: int) -> None:
        """Run the model as often as whoever has the most batches to measure: peers need this rank's part of it."""
        size = self._evaluation_batch
        longest = math.ceil(len(dataset) / self._scheme.num_shards)  # type: ignore[arg-type]
        for _ in range(math.ceil(longest / size) - math.ceil(num_measured / size)):
            for batch in evaluation_loader(self.data, dataset, range(1), size):
                batch = to_device(batch, self.group.device)
                self.recipe.loss(self.model, batch)
                self.recipe.metrics(self.model, batch)

    def close(self) -> None:
        """Take the hooks off the model, and let go of the process group."""
        self._gradients.close()
        if self.is_divided:
            from shoal.train.sharded import release

            release(self.model, self._mesh)

    def _seed_for(self, *what: int | str) -> None:
        seed_everything(derive_seed(self._seed, *what))

    def _loader(self) -> DataLoader[Any]:
        return training_loader(
            self.data,
            self._order,
            range(self.steps_done, self.target_steps),
            self._scheme.mine,
            self._scheme.num_shards,
            left_out=self.left_out,
            quarantine=self.quarantine,
            pin_memory=self.group.device.type == "cuda",
            sample_seed=derive_seed(self._seed, "sample"),
        )

    def _weight(self) -> float:
        """The share of the batch's samples that this batch is."""
        shard = self._scheme.mine[self._part]
        return len(self._order.positions(0, shard, self._scheme.num_shards)) / self.recipe.batch_size

    def _build_gradients(self) -> Gradients:
        if self.is_divided:
            from shoal.train.sharded import ShardedGradients

            return ShardedGradients(
                self.model, self.group, num_parts=self._num_parts, riders=self._buffers.riders
            )
        return GradientBuckets(
            self.model.parameters(),
            self._scheme.additions,
            self._scheme.exchange,
            device=self.group.device,
            riders=self._buffers.riders,
        )

    def _share_initial_weights(self) -> None:
        for tensor in [*self.model.parameters(), *self.model.buffers()]:
            dense = tensor.data.contiguous()  # collectives refuse other memory layouts
            self.group.broadcast(dense)
            tensor.data.copy_(dense)


def _merge_means(parts: list[tuple[dict[str, float], int]]) -> dict[str, float]:
    total = sum(count for _, count in parts)
    names = {name: None for sums, _ in parts for name in sums}
    return {name: sum(sums.get(name, 0.0) for sums, _ in parts) / total for name in names}


def _length(dataset: Any, split: str) -> int:
    try:
        length = len(dataset)
    except TypeError:
        raise RecipeError(
            f"build_data: the {split} dataset has no len(); shoal takes map-style datasets (len(d), d[i])"
        ) from None
    if length == 0:
        raise RecipeError(f"build_data: the {split} dataset is empty")
    return length
