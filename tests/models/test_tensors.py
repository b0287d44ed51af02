"""Tensors in any layout, as safetensors."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_file
from torch import Tensor, nn

from shoal.errors import CorruptError, RecipeError, StorageError
from shoal.models import load_tensors, save_tensors
from shoal.storage import commit


def round_trip(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    save_tensors(path, tensors)
    loaded = load_tensors(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name], tensor), name
    return loaded


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool],
)
def test_every_type_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    round_trip(
        tmp_path / "a", {"a": tensor, "scalar": tensor[1, 1], "empty": tensor[:0], "empty2": tensor[:0]}
    )


def test_every_layout_comes_back(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = {
        "base": base,
        "same": base,
        "transposed": base.t(),
        "flat": base.view(-1),
        "row": base[1],
        "column": base[:, 2],
        "overlapping": base[1:3],
        "expanded": torch.randn(1, 3).expand(5, 3),
        "parameter": nn.Parameter(torch.randn(3)),
        "image": image,
    }
    loaded = round_trip(tmp_path / "a", tensors)
    assert loaded["same"].data_ptr() == loaded["base"].data_ptr()


def test_a_part_of_a_large_tensor_costs_only_its_own_bytes(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"row": torch.zeros(1000, 1000)[3]})
    assert (tmp_path / "a").stat().st_size < 5000


def test_tied_weights_are_stored_once_and_read_by_others(tmp_path: Path) -> None:
    def make() -> nn.Module:
        net = nn.Sequential(nn.Linear(50, 50, bias=False), nn.ReLU(), nn.Linear(50, 50, bias=False))
        net[2].weight = net[0].weight
        return net

    net, other = make(), make()
    save_tensors(tmp_path / "a.safetensors", net.state_dict())
    assert (tmp_path / "a.safetensors").stat().st_size < 1.2 * 50 * 50 * 4
    load_model(other, tmp_path / "a.safetensors", strict=True)
    assert torch.equal(other[2].weight, net[0].weight)


@pytest.mark.parametrize("value", [{"any": "object"}, torch.eye(3).to_sparse(), None, 1])
def test_objects_are_never_pickled(tmp_path: Path, value: object) -> None:
    with pytest.raises(RecipeError, match="_extra_state is a"):
        save_tensors(tmp_path / "a", {"_extra_state": value})  # type: ignore[dict-item]
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_no_safetensors_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "good")
    content = (tmp_path / "good").read_bytes()
    bad = [b"", b"\0" * 8, b"\xff" * 16, content[:-1], content + b"\0", b"\x80\x04N."]
    for number, damaged in enumerate(bad):
        (tmp_path / str(number)).write_bytes(damaged)
        with pytest.raises(CorruptError, match="not a safetensors file"):
            load_tensors(tmp_path / str(number))
    save_file({"a": torch.zeros(3)}, tmp_path / "tied", metadata={"b": "c"})
    with pytest.raises(CorruptError, match="'c'"):
        load_tensors(tmp_path / "tied")
    with pytest.raises(OSError, match="No such file"):
        load_tensors(tmp_path / "missing")


def test_a_disk_error_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as raised:
        save_tensors(tmp_path / "missing" / "a", {"a": torch.zeros(3)})
    assert raised.value.errno == errno.ENOENT


def test_a_file_that_grows_beyond_the_limit_of_the_process(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(100_000)}
    if (pid := os.fork()) == 0:  # the limit cannot be taken back; no torch computation in the child
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            commit(tmp_path / "target", lambda path: save_tensors(path / "a", tensors), meta={})
        except StorageError as error:
            os._exit(7 if "File too large" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert os.listdir(tmp_path) == []


def test_tensors_in_a_committed_directory_are_private(tmp_path: Path) -> None:
    commit(tmp_path / "a", lambda path: save_tensors(path / "t", {"a": torch.zeros(3)}), meta={})
    assert (tmp_path / "a" / "t").stat().st_mode & 0o777 == 0o600


def test_importing_the_rooms_loads_nothing_heavy() -> None:
    heavy = {"torch", "ray", "mlflow", "pandas", "pydantic", "safetensors"}
    code = f"import sys, shoal.storage, shoal.models; print({heavy} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout == "set()\n"
