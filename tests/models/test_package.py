"""A model version: what is loaded is what was written, or a clear error."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from shoal.api import Model
from shoal.errors import CorruptError, NotFoundError, RecipeError, RequestError, ShoalError, StorageError
from shoal.models import Lineage, ModelPackage, write_package
from shoal.recipe import load_recipe
from shoal.storage import Disk, Manifest, commit, verify
from shoal.tracking import ResolvedModel

LINEAGE = Lineage(
    recipe="models_project:Small",
    fields={"width": 6},
    data_fingerprint="sha256:abc",
    code_revision="0123abc",
    run="small-0a1b2c3d",
    trial=None,
    checkpoint_step=700,
    metrics={"val_accuracy": 0.97},
    created=1_764_000_000.5,
)


def trained(**fields: Any) -> nn.Module:
    """A model whose weights and buffers all differ from those that a new one starts with."""
    torch.manual_seed(1)
    net = load_recipe("models_project:Small")(**fields).build_model()
    for _ in range(3):
        net(torch.randn(16, 3))
    assert net.norm.num_batches_tracked == 3
    return net.eval()


def write(directory: Path, lineage: Lineage = LINEAGE, net: nn.Module | None = None) -> Manifest:
    net = trained(**lineage.fields) if net is None else net
    return write_package(directory, net.state_dict(), model="small", version=3, lineage=lineage)


@pytest.fixture
def package(project: Path, tmp_path: Path) -> Path:
    write(tmp_path / "models" / "small" / "3")
    return tmp_path / "models" / "small" / "3"


def rewrite(directory: Path, added: Mapping[str, str] | None = None, **description: Any) -> Path:
    """Commit the package anew beside ``directory``, correctly, with a changed description and added files."""
    changed = {**json.loads((directory / "model.json").read_text()), **description}

    def copy(target: Path) -> None:
        shutil.copy(directory / "model.safetensors", target)
        for name, text in {**(added or {}), "model.json": json.dumps(changed)}.items():
            (target / name).write_text(text)

    commit(directory.parent / "changed", copy, meta={"kind": "model"})
    return directory.parent / "changed"


def test_exchanged_folders_are_noticed(package: Path) -> None:
    assert ModelPackage.open(package, expect="small@3").name == "small@3"
    exchanged = package.rename(package.with_name("2"))
    with pytest.raises(CorruptError, match=r"2 holds small@3, not small@2: were folders exchanged\?"):
        ModelPackage.open(exchanged, expect="small@2")


def test_the_registry_s_models_are_what_they_are_called(package: Path) -> None:
    exchanged = Model(ResolvedModel(model="small", version=2, path=package.rename(package.with_name("2"))))
    for use in (exchanged.load, lambda: exchanged.predict(TensorDataset(torch.ones(2, 3)))):
        with pytest.raises(CorruptError, match="holds small@3, not small@2"):
            use()


def test_the_model_comes_back_with_everything(package: Path) -> None:
    net = trained(width=6)
    opened = ModelPackage.open(package)
    assert (opened.model, opened.version, opened.name) == ("small", 3, "small@3")
    assert opened.lineage == LINEAGE
    assert (opened.recipe.width, type(opened.recipe).__name__) == (6, "Small")  # type: ignore[attr-defined]
    loaded = opened.load()
    assert not any(module.training for module in loaded.modules())
    expected, found = net.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert loaded.out.weight is loaded.embed.weight
    inputs = torch.randn(7, 3)
    assert torch.equal(net(inputs), loaded(inputs))


def test_it_is_two_files_and_a_manifest(package: Path) -> None:
    assert sorted(path.name for path in package.iterdir()) == [
        "MANIFEST.json",
        "model.json",
        "model.safetensors",
    ]
    assert verify(package).meta == {"kind": "model", "model": "small", "version": 3}
    assert json.loads((package / "model.json").read_text())["lineage"]["recipe"] == "models_project:Small"


def test_a_newly_imported_recipe_gives_the_same_answers(package: Path) -> None:
    expected = trained(width=6)(torch.ones(2, 3))
    del sys.modules["models_project"]
    assert torch.equal(ModelPackage.open(package).predict(torch.ones(2, 3)), expected)  # type: ignore[arg-type]


def test_each_load_is_a_module_of_its_own_and_leaves_the_random_state(package: Path) -> None:
    opened = ModelPackage.open(package)
    torch.manual_seed(1)
    first = opened.load()
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = opened.load()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.scratch, second.scratch)
    with torch.no_grad():
        first.first.weight.zero_()
    assert second.first.weight.abs().sum() > 0
    assert verify(package)


def test_predict_takes_what_training_takes(package: Path) -> None:
    inputs, targets = torch.randn(10, 3), torch.arange(10)
    expected = trained(width=6)(inputs).detach()
    opened = ModelPackage.open(package)
    for dataset in (
        TensorDataset(inputs, targets),
        inputs,
        [(x, int(y)) for x, y in zip(inputs, targets, strict=True)],
        list(inputs.numpy()),
    ):
        for batch_size in (3, 10, 256):
            output = opened.predict(dataset, batch_size=batch_size)  # type: ignore[arg-type]
            torch.testing.assert_close(output, expected)
            assert not output.requires_grad


def test_predict_refuses_what_it_cannot_do(package: Path, project: Path, tmp_path: Path) -> None:
    opened = ModelPackage.open(package)
    with pytest.raises(RequestError, match="0 samples"):
        opened.predict(torch.zeros(0, 3))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="by 0"):
        opened.predict(torch.zeros(1, 3), batch_size=0)  # type: ignore[arg-type]
    for what, found in (("pair", "tuple"), ("scalar", r"shape \(\)")):
        lineage = replace(LINEAGE, recipe="models_project:Returns", fields={"what": what})
        net = load_recipe("models_project:Returns")(what=what).build_model()
        write(tmp_path / what, lineage, net)
        with pytest.raises(RecipeError, match=f"answers 2 samples with {found}"):
            ModelPackage.open(tmp_path / what).predict(torch.zeros(2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "recipe",
    [
        "__main__:Small",
        "models_project:make.<locals>.Small",
        "models_project",
        "",
        ".x:Y",
        "a.b:C.D",
        "os; x:Y",
        "__main__.a:B",
    ],
)
def test_a_recipe_that_nobody_could_import_is_refused_when_writing(
    project: Path, tmp_path: Path, recipe: str
) -> None:
    with pytest.raises(RecipeError, match="Move it to a file"):
        write(tmp_path / "target", replace(LINEAGE, recipe=recipe), nn.Linear(1, 1))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"recipe": "models_project:Missing"}, NotFoundError, "Missing"),
        ({"recipe": "no_such_module:Small"}, NotFoundError, "no_such_module"),
        ({"recipe": "models_project:NotARecipe"}, NotFoundError, "NotARecipe"),
        ({"fields": {"width": 7}}, RecipeError, "does not take these weights.*size mismatch"),
        ({"fields": {"depth": 7}}, RecipeError, "depth"),
        ({"fields": {"broken": True}}, RecipeError, "build_model.. failed: RuntimeError: no such layer"),
        (
            {"recipe": "models_project:Returns", "fields": {"what": "none"}},
            RecipeError,
            "returned a NoneType",
        ),
    ],
)
def test_what_would_not_load_is_never_written(
    project: Path, tmp_path: Path, changes: dict[str, Any], error: type[ShoalError], match: str
) -> None:
    with pytest.raises(error, match=f"(?s){match}"):
        write(tmp_path / "target", replace(LINEAGE, **changes), trained(width=6))
    assert not (tmp_path / "target").exists()


def test_a_version_is_written_once(package: Path) -> None:
    with pytest.raises(StorageError, match="exists already"):
        write(package)


def test_a_full_disk_leaves_no_model(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Disk, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Disk, "sync_file", fail)
    with pytest.raises(StorageError, match="No space left"):
        write(tmp_path / "models" / "target")
    assert list((tmp_path / "models").iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "model.json", "MANIFEST.json"])
def test_changed_files_are_refused_before_and_after_opening(package: Path, name: str) -> None:
    opened = ModelPackage.open(package)
    content = bytearray((package / name).read_bytes())
    content[len(content) // 2] ^= 1
    (package / name).write_bytes(content)
    with pytest.raises(CorruptError, match="damaged"):
        ModelPackage.open(package)
    with pytest.raises(CorruptError, match="damaged"):
        opened.load()


def test_another_model_in_its_place_is_noticed(package: Path, tmp_path: Path) -> None:
    opened = ModelPackage.open(package)
    shutil.rmtree(package)
    write(package, replace(LINEAGE, run="another"))
    with pytest.raises(CorruptError, match="another model"):
        opened.load()


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no model"):
        ModelPackage.open(tmp_path / "nothing")
    commit(tmp_path / "checkpoint", lambda path: (path / "a").touch(), meta={"kind": "checkpoint"})
    with pytest.raises(CorruptError, match="is no model"):
        ModelPackage.open(tmp_path / "checkpoint")

    def write_both(path: Path) -> None:
        for name in ("model.safetensors", "model.json"):
            (path / name).touch()

    commit(tmp_path / "other", write_both, meta={"kind": "checkpoint"})
    with pytest.raises(CorruptError, match="is no model"):
        ModelPackage.open(tmp_path / "other")
    commit(tmp_path / "empty", lambda path: None, meta={"kind": "model"})
    with pytest.raises(CorruptError, match="is no model"):
        ModelPackage.open(tmp_path / "empty")


@pytest.mark.parametrize(
    "description",
    [
        {"format": 2},
        {"version": "3"},
        {"model": None},
        {"lineage": None},
        {"lineage": {}},
        {"lineage": {**LINEAGE.as_dict(), "more": 1}},
        {"lineage": {**LINEAGE.as_dict(), "fields": [1]}},
        {"lineage": {**LINEAGE.as_dict(), "checkpoint_step": "last"}},
    ],
)
def test_a_description_from_elsewhere_is_checked(package: Path, description: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=r"model\.json does not describe a model"):
        ModelPackage.open(rewrite(package, **description))


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        ("models_project:NotARecipe", NotFoundError),
        ("models_project:Recipe.__init__", RecipeError),
        ("os:system", NotFoundError),
        ("builtins:exec", NotFoundError),
        ("__main__:Small", RecipeError),
        ("evil_module:Evil", NotFoundError),
    ],
)
def test_a_package_from_elsewhere_runs_nothing_but_a_recipe(
    package: Path, recipe: str, error: type[ShoalError]
) -> None:
    changed = rewrite(package, lineage={**LINEAGE.as_dict(), "recipe": recipe})
    with pytest.raises(error):
        ModelPackage.open(changed).load()


def test_code_in_a_package_is_not_on_the_path(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lineage = {**LINEAGE.as_dict(), "recipe": "evil_module:Evil"}
    changed = rewrite(package, {"evil_module.py": "raise SystemExit('it ran')"}, lineage=lineage)
    monkeypatch.chdir(changed)
    with pytest.raises(NotFoundError, match="evil_module"):
        ModelPackage.open(changed).load()


def test_code_that_changed_since_is_named(package: Path, project: Path) -> None:
    source = (project / "models_project.py").read_text()
    (project / "models_project.py").write_text(source.replace("nn.BatchNorm1d(width)", "nn.LayerNorm(width)"))
    shutil.rmtree(project / "__pycache__", ignore_errors=True)
    sys.modules.pop("models_project")
    with pytest.raises(
        RecipeError, match=r"(?s)run small-0a1b2c3d \(code revision 0123abc\).*norm\.running_mean"
    ):
        ModelPackage.open(package).load()


def test_the_repr_is_short(package: Path) -> None:
    assert "sha256" not in repr(ModelPackage.open(package)).replace("sha256:abc", "")
