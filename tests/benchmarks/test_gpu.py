"""The script for a GPU, on the CPU and small: both sides train, and every figure is printed."""

from __future__ import annotations

import re

import pytest

from benchmarks import checkpoint, gpu

SMALL = {"layers": 1, "width": 64, "heads": 2, "context": 16, "vocabulary": 256, "batch": 2}


def test_both_sides_train_and_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "STEPS", 2)
    trainings: list[gpu.GptTraining] = []
    monkeypatch.setattr(checkpoint, "run", lambda training, rounds: trainings.append(training) or True)
    sizes = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    gpu.main(["--device", "cpu", "--rounds", "2", "--peak-tflops", "1", *sizes])
    printed = capsys.readouterr().out
    rates = {
        side: float(rate.replace(",", ""))
        for side, rate in re.findall(r"  (\w+) .*?([\d,]+) tokens/s", printed)
    }
    assert set(rates) == {"shoal", "plain"}
    assert min(rates.values()) > 0
    assert re.search(r"tokens/s, shoal / plain: \d", printed)
    assert trainings[0].step() > 0


def test_flops_of_the_model_that_papers_name() -> None:
    """GPT-3's table: 6 N per token, 0.75 G for 125M parameters; attention comes on top."""
    assert gpu.Shape().flops_per_token(124_475_904) == pytest.approx(0.855e9, rel=0.01)


def test_a_machine_without_a_gpu_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "--device cpu" in capsys.readouterr().err
