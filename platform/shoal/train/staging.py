"""Snapshots of a large state: copied into reused memory, as the files that they will be, while the next step begins.

The copy of a tensor that nothing but the optimizer's step changes may go on until then. Everything else is copied
before `Staging.stage` returns: buffers change in the next forward pass.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from shoal.errors import DeadlineExceeded
from shoal.models.layout import Layout, place_of, plan_layout
from shoal.storage.background import Span
from shoal.train.arena import Arena

Files = Mapping[str, Mapping[str, torch.Tensor]]
"""Tensors by name, by file."""
PIECE_BYTES = 4 * 2**20
"""How much is copied at a time: two threads share the work piece by piece."""
COPY_TIMEOUT_S = 120.0
_PAGE_BYTES = 4096


class _Copy(NamedTuple):
    target: torch.Tensor
    source: torch.Tensor


class Copying:
    """Copies under way; any number of threads may help with `finish`."""

    def __init__(self, copies: Iterable[_Copy]) -> None:
        copies = list(copies)
        self._pieces = deque(_in_pieces(copies))
        self._num_left = len(self._pieces)
        self._versions = [(copy.source, _version(copy.source)) for copy in copies]
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._failure: BaseException | None = None
        self.is_torn = False
        """Once done: whether something was changed while it was copied, so that the copy is of no use."""
        if not self._pieces:
            self._end()

    def finish(self) -> None:
        """Copy what is left, and wait for what others are copying.

        Raises:
            DeadlineExceeded: the other thread did not finish its piece within `COPY_TIMEOUT_S`.
        """
        while not self._done.is_set():
            try:
                targets, sources = self._pieces.popleft()
            except IndexError:
                break
            try:
                torch._foreach_copy_(targets, sources)
            except BaseException as failure:
                self._failure = failure
                raise
            finally:
                with self._lock:
                    self._num_left -= 1
                    if self._num_left == 0:
                        self._end()
        if not self._done.wait(COPY_TIMEOUT_S):
            raise DeadlineExceeded(f"copying a snapshot took more than {COPY_TIMEOUT_S:g} s")
        if self._failure is not None:
            raise self._failure

    def _end(self) -> None:
        # Before anybody is told: the optimizer's step, which waits for it, changes every version.
        self.is_torn = any(_version(source) != version for source, version in self._versions)
        self._versions = []  # hold nothing of the training's memory
        self._done.set()


def _version(tensor: torch.Tensor) -> int:
    """Counts changes in place, whoever makes them; what was made in inference mode has no such count."""
    return 0 if tensor.is_inference() else tensor._version


def _in_pieces(copies: list[_Copy]) -> Iterable[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Lists of (targets, sources) of about `PIECE_BYTES` each; large tensors are cut."""
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    size_bytes = 0
    for target, source in copies:
        for part in _cut(target, source):
            targets.append(part.target)
            sources.append(part.source)
            size_bytes += part.target.nbytes
            if size_bytes >= PIECE_BYTES:
                yield targets, sources
                targets, sources, size_bytes = [], [], 0
    if targets:
        yield targets, sources


def _cut(target: torch.Tensor, source: torch.Tensor) -> Iterable[_Copy]:
    if target.nbytes <= PIECE_BYTES or not source.is_contiguous():
        return [_Copy(target, source)]
    count = PIECE_BYTES // target.element_size()
    return map(_Copy, torch.split(target.view(-1), count), torch.split(source.view(-1), count))


@dataclass(frozen=True)
class Staged:
    """A snapshot in the arena; valid until the next one is taken."""

    files: Files
    """The tensors as they lie there; whole once `copying` is done."""
    spans: Mapping[str, Span]
    """Where in the arena each file lies, header and all."""
    memory: int
    """The arena's descriptor."""
    copying: Copying


@dataclass(frozen=True)
class _Plan:
    key: object
    layouts: Mapping[str, Layout]
    files: Files
    spans: Mapping[str, Span]
    size_bytes: int


class Staging:
    """The arena of one process and the plan of what goes where in it; one snapshot at a time."""

    def __init__(self) -> None:
        self._arena = Arena()
        self._plan: _Plan | None = None

    @property
    def memory(self) -> int:
        """The arena's descriptor."""
        return self._arena.descriptor

    def prepare(self, files: Files) -> None:
        """Plan for such tensors, and touch the memory: the first write to a page is what costs."""
        self._arena.reserve(self._planned(files).size_bytes)[::_PAGE_BYTES].bitwise_or_(0)

    def stage(self, files: Files, *, later: Callable[[str, str], bool]) -> Staged:
        """Begin a snapshot of ``files``; ``later(file, name)`` says what may be copied after this returns.

        What is on another device than the CPU is never left for later.

        Raises:
            RecipeError: a value is not a dense tensor of a type that safetensors knows.
        """
        plan = self._planned(files)
        now: list[_Copy] = []
        then: list[_Copy] = []
        for file, tensors in files.items():
            for name in plan.layouts[file].places:
                source = tensors[name]
                is_later = source.device.type == "cpu" and later(file, name)
                (then if is_later else now).append(_Copy(plan.files[file][name], source))
        Copying(now).finish()
        return Staged(plan.files, plan.spans, self.memory, Copying(then))

    def close(self) -> None:
        """Let go of the memory."""
        self._plan = None
        self._arena.close()

    def _planned(self, files: Files) -> _Plan:
        """The plan, made anew only when names, types, shapes or ties changed."""
        key = [
            (file, name, place_of(tensor))
            for file, tensors in files.items()
            for name, tensor in tensors.items()
        ]
        if self._plan is None or self._plan.key != key:
            self._plan = self._lay_out(key, files)
        return self._plan

    def _lay_out(self, key: object, files: Files) -> _Plan:
        layouts = {file: plan_layout(tensors) for file, tensors in files.items()}
        spans, end = {}, 0
        for file, layout in layouts.items():
            spans[file] = Span(end, layout.size_bytes)
            end += -(-layout.size_bytes // _PAGE_BYTES) * _PAGE_BYTES
        memory = self._arena.reserve(end)
        placed = {
            file: _place(memory[spans[file].begin :], layout, files[file]) for file, layout in layouts.items()
        }
        return _Plan(key, layouts, placed, spans, end)


def _place(
    memory: torch.Tensor, layout: Layout, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Write the header; views of the memory for the tensors, by all their names."""
    memory[: len(layout.header)] = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
    placed = {
        name: memory[begin : begin + tensors[name].nbytes].view(tensors[name].dtype).view(tensors[name].shape)
        for name, begin in layout.places.items()
    }
    return placed | {alias: placed[name] for alias, name in layout.aliases.items()}
