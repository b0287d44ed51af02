"""Snapshots in shared memory: laid out as files, copied while the next step begins, and torn ones noticed."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal.models import save_tensors
from shoal.train import staging
from shoal.train.staging import Staged, Staging

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def stage() -> Iterator[Staging]:
    stage = Staging()
    yield stage
    stage.close()


def some(seed: int = 0) -> Tensors:
    torch.manual_seed(seed)
    return {
        "weight": torch.randn(300, 70),
        "turned": torch.randn(40, 30).t(),
        "step": torch.tensor(3.0),
        "half": torch.randn(5).bfloat16(),
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
    }


def file_of(staged: Staged, name: str) -> bytes:
    return os.pread(staged.memory, staged.spans[name].size_bytes, staged.spans[name].begin)


def never(file: str, name: str) -> bool:
    return False


def always(file: str, name: str) -> bool:
    return True


def test_the_memory_holds_the_files_that_would_be_written(
    tmp_path: Path, stage: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "PIECE_BYTES", 1000)  # large tensors are cut, small ones put together
    for seed in range(2):
        files = {"a": some(seed), "b": {"x": torch.full((9,), float(seed))}}
        stage.prepare(files)
        staged = stage.stage(files, later=always)
        staged.copying.finish()
        for name, tensors in files.items():
            save_tensors(tmp_path / name, tensors)
            assert file_of(staged, name) == (tmp_path / name).read_bytes()
            assert all(torch.equal(staged.files[name][key], value) for key, value in tensors.items())


def test_memory_is_reused_until_shapes_change(stage: Staging) -> None:
    tensors = some()
    first = stage.stage({"a": tensors}, later=never).files["a"]
    tensors["weight"] += 1
    again = stage.stage({"a": tensors}, later=never).files["a"]
    assert again["weight"] is first["weight"]
    larger = {**tensors, "weight": torch.randn(3000, 70)}
    grown = stage.stage({"a": larger}, later=never)
    assert torch.equal(grown.files["a"]["weight"], larger["weight"])
    assert len(file_of(grown, "a")) > larger["weight"].nbytes


def test_tied_tensors_are_copied_once_and_found_under_all_names(stage: Staging) -> None:
    tied = torch.randn(4)
    files = stage.stage({"a": {"x": tied, "y": tied}}, later=never).files["a"]
    assert files["x"] is files["y"]


def test_what_may_change_is_copied_at_once_and_the_rest_until_it_is_needed(stage: Staging) -> None:
    tensors: Tensors = {"buffer": torch.zeros(3), "parameter": torch.zeros(3)}
    staged = stage.stage({"a": tensors}, later=lambda file, name: name == "parameter")
    tensors["buffer"] += 1
    staged.copying.finish()
    tensors["parameter"] += 1  # the optimizer's step
    assert not staged.copying.is_torn
    assert all(not value.any() for value in staged.files["a"].values())


def test_what_changed_while_it_was_copied_is_noticed(stage: Staging) -> None:
    tensors = some()
    staged = stage.stage({"a": tensors}, later=always)
    tensors["weight"][0] = 1
    staged.copying.finish()
    assert staged.copying.is_torn


def test_who_waits_for_the_copy_helps(stage: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not go on before the piece that the other thread has is copied, too."""
    copy = torch._foreach_copy_
    helped, begun = threading.Event(), threading.Event()

    def held_up(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        if threading.current_thread() is other:
            begun.set()
            assert helped.wait(60)
        else:
            helped.set()
        copy(targets, sources)

    monkeypatch.setattr(staging, "PIECE_BYTES", 1000)
    tensors = some()
    staged = stage.stage({"a": tensors}, later=always)
    other = threading.Thread(target=staged.copying.finish)
    monkeypatch.setattr(torch, "_foreach_copy_", held_up)
    other.start()
    assert begun.wait(60)
    staged.copying.finish()
    assert all(torch.equal(staged.files["a"][name], value) for name, value in tensors.items())
    other.join()
