"""The layout of a safetensors file, compared with what safetensors itself writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.errors import RecipeError
from shoal.models import load_tensors, save_tensors
from shoal.models.layout import Layout, plan_layout

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.int32, torch.float32,
    torch.float64, torch.int64, torch.complex64, torch.float8_e5m2, torch.float8_e4m3fn, torch.uint16, torch.uint32,
    torch.uint64,
]  # fmt: skip


def rendered(layout: Layout, tensors: dict[str, torch.Tensor]) -> bytes:
    """The file, made by hand."""
    content = bytearray(layout.size_bytes)
    content[: len(layout.header)] = layout.header
    for name, begin in layout.places.items():
        raw = (
            bytes(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())
            if tensors[name].numel()
            else b""
        )
        content[begin : begin + len(raw)] = raw
    return bytes(content)


def test_it_is_the_file_that_safetensors_writes_byte_for_byte(tmp_path: Path) -> None:
    tensors = {
        f"{dtype}{shape}": torch.ones(shape).to(dtype) for dtype in DTYPES for shape in [(3, 2), (), (0, 4)]
    }
    tensors |= {"é\n\"'": torch.arange(7), "turned": torch.arange(6).reshape(2, 3).t()}
    save_tensors(tmp_path / "file", tensors)
    assert rendered(plan_layout(tensors), tensors) == (tmp_path / "file").read_bytes()


def test_tied_tensors_have_one_place(tmp_path: Path) -> None:
    tied = torch.arange(4.0)
    tensors = {"first": tied, "other": torch.zeros(2), "second": tied, "part": tied[:2]}
    layout = plan_layout(tensors)
    assert (set(layout.places), layout.aliases) == ({"first", "other", "part"}, {"second": "first"})
    (tmp_path / "file").write_bytes(rendered(layout, tensors))
    back = load_tensors(tmp_path / "file")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.eye(2).to_sparse(), "only plain dense tensors"),
        (torch.zeros(1, dtype=torch.complex128), "complex128, which safetensors does not know"),
    ],
)
def test_what_safetensors_cannot_hold_is_refused(value: torch.Tensor, match: str) -> None:
    with pytest.raises(RecipeError, match=f"odd is .*{match}"):
        plan_layout({"odd": value})
