"""Recipes that sweeps in tests search; importable by the processes of a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import shoal


class Line(shoal.Recipe):
    """Fit y = 3x: trains in milliseconds, and how well depends on ``lr`` alone."""

    objective = shoal.minimize("error")
    steps = 40

    batch_size: int = 8
    eval_every: int = 10
    lr: float = 0.01
    width: int = 1
    bias: bool = False
    kind: str = "plain"
    flag_dir: str = ""

    def build_data(self) -> shoal.Datasets:
        import torch
        from torch.utils.data import TensorDataset

        x = torch.linspace(-1, 1, 64).reshape(-1, 1)
        return shoal.Datasets(train=TensorDataset(x, 3 * x), val=TensorDataset(x, 3 * x))

    def build_model(self) -> Any:
        from torch import nn

        if self.kind == "broken":
            raise ValueError("this model cannot be built")
        return nn.Linear(1, 1, bias=self.bias)

    def build_optimizer(self, model: Any) -> Any:
        from torch.optim import SGD

        return SGD(model.parameters(), lr=self.lr)

    def loss(self, model: Any, batch: Any) -> Any:
        x, y = batch
        return ((model(x) - y) ** 2).mean()

    def metrics(self, model: Any, batch: Any) -> dict[str, Any]:
        x, y = batch
        return {"error": (model(x) - y).abs().mean()}

    def train(self, session: Any) -> None:
        """The usual loop; with a ``flag_dir``, the first to come half way says so and waits to be killed."""
        for batch in session.batches():
            session.backward(session.loss(batch))
            session.step()
            if self.flag_dir and session.steps_done == self.steps // 2:
                self._wait_to_be_killed()

    def _wait_to_be_killed(self) -> None:
        import threading

        try:
            flag = os.open(Path(self.flag_dir) / "victim", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.write(flag, f"{os.getpid()}\n".encode())
        os.close(flag)
        threading.Event().wait(60)


class Member(Line):
    """One of a population of four: begins when all are there, and writes down which weights it had when."""

    depth: int = 1

    def build_model(self) -> Any:
        from torch import nn

        return nn.Sequential(*[nn.Linear(1, 1) for _ in range(self.depth)])

    def train(self, session: Any) -> None:
        if session.steps_done == 0:
            self._wait_for_the_others()
        self._write_down(session, begins=True)
        for batch in session.batches():
            session.backward(session.loss(batch))
            session.step()
            self._write_down(session, begins=False)

    def _wait_for_the_others(self) -> None:
        import time

        (Path(self.flag_dir) / f"here-{self.lr}").touch()
        deadline = time.monotonic() + 60
        while len(list(Path(self.flag_dir).glob("here-*"))) < 4:
            assert time.monotonic() < deadline, "the others of the population did not come"
            time.sleep(0.02)

    def _write_down(self, session: Any, *, begins: bool) -> None:
        import hashlib
        import json

        weights = hashlib.sha256()
        for tensor in session.model.state_dict().values():
            weights.update(tensor.numpy().tobytes())
        line = {
            "lr": self.lr,
            "step": session.steps_done,
            "weights": weights.hexdigest(),
            "begins": begins,
        }
        with (Path(self.flag_dir) / "seen.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
