"""What a user subclasses: data, model, loss. Knows nothing of Ray, and loads torch only to build things."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, dataclass_transform, get_type_hints

from shoal.errors import NotFoundError, RecipeError, did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import Dataset

    from shoal.train.session import Session


@dataclass(frozen=True)
class Objective:
    """Which validation metric says that one checkpoint, run or trial is better than another."""

    metric: str
    """A key of `Recipe.metrics`, or ``loss`` for the validation loss."""
    mode: Literal["min", "max"]

    def is_better(self, value: float, than: float | None) -> bool:
        """True if ``value`` beats ``than``; anything but NaN beats None."""
        if value != value:
            return False
        if than is None or than != than:
            return True
        return value > than if self.mode == "max" else value < than

    def best(self, values: Mapping[int, float], count: int) -> dict[int, float]:
        """The ``count`` best of ``values`` by step, best first; of equals the earlier step. NaN never is."""
        sign = -1.0 if self.mode == "max" else 1.0
        measured = {step: value for step, value in values.items() if value == value}
        ranked = sorted(measured, key=lambda step: (sign * measured[step], step))
        return {step: measured[step] for step in ranked[:count]}

    def __str__(self) -> str:
        return f"{'highest' if self.mode == 'max' else 'lowest'} {self.metric}"


def maximize(metric: str) -> Objective:
    """The highest ``metric`` on validation data is best."""
    return Objective(metric, "max")


def minimize(metric: str) -> Objective:
    """The lowest ``metric`` on validation data is best."""
    return Objective(metric, "min")


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """What `Recipe.build_data` returns: map-style datasets (``len(d)`` and ``d[i]``).

    The order of the training data is shoal's affair (a function of seed and step alone), so a dataset
    holds samples, not batches, and does not shuffle.
    """

    train: Dataset[Any]
    val: Dataset[Any]
    """Chooses the best checkpoint and trial; never trained on."""
    test: Dataset[Any] | None = None
    """Measured once, at the end of the run; never used to choose anything."""
    collate: Callable[[list[Any]], Any] | None = None
    """Makes a batch of a list of samples; None for torch's ``default_collate``."""
    loader_workers: int = 0
    """Processes that load samples, per worker of the run; 0 loads in the training process."""
    tries: int = 3
    """How often a training sample whose loading raises is tried again before another takes its place for good."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Recipe:
    """What to train: its data, model and loss, with hyperparameters as typed fields.

    A subclass becomes a frozen, keyword-only dataclass whose fields are validated by pydantic::

        class Digits(shoal.Recipe):
            objective = shoal.maximize("accuracy")
            lr: float = 1e-3
            def build_data(self): ...
            def build_model(self): ...
            def loss(self, model, batch): ...

    Raises (when a subclass or an instance is made):
        RecipeError: a field hides a name of Recipe, is unknown, or has a value of the wrong type, or ``eval_every``
            is below 1.
    """

    objective: ClassVar[Objective] = minimize("loss")
    """What "best" means for checkpoints, sweeps and `register`; measured on validation data."""
    steps: ClassVar[int] = 1000
    """Length of a run that does not say ``steps=``."""

    batch_size: int = 32
    """Samples per step over all workers together, whatever their number."""
    eval_every: int = 100
    """Steps between two looks at the validation data, 1 or more; there is always one at the end."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _refuse_hidden_names(cls)
        _make_dataclass(cls)

    def build_data(self) -> Datasets:
        """Load or make the data. Called once in every worker; the same call must give the same data."""
        raise NotImplementedError

    def build_model(self) -> nn.Module:
        """A freshly initialised model on the CPU; shoal has seeded torch before."""
        raise NotImplementedError

    def build_optimizer(self, model: nn.Module) -> Optimizer:
        """AdamW over all parameters, with the field ``lr`` if the recipe has one (else torch's default)."""
        import torch

        lr = getattr(self, "lr", None)
        return torch.optim.AdamW(model.parameters(), **({} if lr is None else {"lr": lr}))

    def build_scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """A learning-rate schedule, stepped after every step; None for a constant rate."""
        return None

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """A scalar to minimise: the mean over the batch's samples. ``batch`` is on the model's device."""
        raise NotImplementedError

    def metrics(self, model: nn.Module, batch: Any) -> Mapping[str, Any]:
        """Means over the batch's samples, by name; measured in eval mode without gradients.

        The validation loss is measured anyway, as ``loss``.
        """
        return {}

    def train(self, session: Session) -> None:
        """The training loop. Override it for a loop of your own; this is the whole of the default::

        for batch in session.batches():
            loss = session.loss(batch)  # self.loss in the run's precision
            session.backward(loss)
            session.step()
        """
        for batch in session.batches():
            session.backward(session.loss(batch))
            session.step()

    def fit(self, *, steps: int | None = None, seed: int = 0) -> Any:
        """Train here, in this process, without Ray or storage; returns a `shoal.train.local.Fitted`.

        Blocks. Breakpoints work. Nothing is written; see ``cluster.train`` for runs that last.
        """
        from shoal.train.local import fit

        return fit(self, steps=steps, seed=seed)


def _make_dataclass(cls: type[Recipe]) -> None:
    """Make ``cls`` a frozen dataclass in place, whose ``__init__`` validates with pydantic first.

    Not pydantic's own dataclass decorator: a notebook's recipe travels to the workers by value, and the
    plainer the class, the less of pydantic's inner state has to survive that.
    """
    dataclass(frozen=True, kw_only=True)(cls)
    plain_init = cls.__init__

    @functools.wraps(plain_init)
    def init(self: Recipe, **kwargs: Any) -> None:
        if type(self) is cls:
            kwargs = _validated(cls, kwargs)
        plain_init(self, **kwargs)

    cls.__init__ = init  # type: ignore[method-assign,assignment]


def _validated(cls: type[Recipe], values: dict[str, Any]) -> dict[str, Any]:
    from pydantic import ValidationError

    try:
        model = _fields_model(cls).model_validate(values)
    except ValidationError as err:
        raise RecipeError(_explain(cls, err)) from None
    found = {name: getattr(model, name) for name in type(model).model_fields}
    if found["batch_size"] < 1:  # here, since a subclass may declare it anew; the same below
        raise RecipeError(
            f"{cls.__name__}: batch_size is a number of samples, 1 or more (found {found['batch_size']})"
        )
    if found["eval_every"] < 1:
        raise RecipeError(
            f"{cls.__name__}: eval_every is a number of steps, 1 or more (found {found['eval_every']}). To look at "
            f"the validation data at the end only, make it as large as the run's steps"
        )
    return found


def _fields_model(cls: type[Recipe]) -> type[BaseModel]:
    """A pydantic model with the recipe's fields."""
    from pydantic import ConfigDict, create_model

    hints = get_type_hints(cls, include_extras=True)
    columns: dict[str, Any] = {}
    for f in fields(cls):  # type: ignore[arg-type]
        # By type, not identity: a class that travelled by value has a MISSING of its own (Python 3.11).
        if not isinstance(f.default, type(MISSING)):
            default = f.default
        elif not isinstance(f.default_factory, type(MISSING)):
            default = f.default_factory()  # type: ignore[operator]
        else:
            default = ...
        columns[f.name] = (hints[f.name], default)
    return create_model(
        cls.__name__,
        __config__=ConfigDict(extra="forbid", protected_namespaces=(), validate_default=True),
        **columns,
    )


def _refuse_hidden_names(cls: type[Recipe]) -> None:
    base_fields = set(Recipe.__annotations__) - {"objective", "steps"}
    taken = {name for name in dir(Recipe) if not name.startswith("_")} - base_fields
    for name, annotation in inspect.get_annotations(cls).items():
        is_classvar = "ClassVar" in str(annotation)
        if name in taken and not is_classvar:
            raise RecipeError(
                f"{cls.__name__}: the field {name!r} hides Recipe.{name}; choose another name "
                f"(taken: {', '.join(sorted(taken))})"
            )


def _explain(cls: type[Recipe], err: ValidationError) -> str:
    known = ", ".join(f"{f.name}: {getattr(f.type, '__name__', f.type)}" for f in fields(cls))  # type: ignore[arg-type]
    lines = [f"{cls.__name__}: {err.error_count()} wrong field{'s' if err.error_count() > 1 else ''}"]
    for problem in err.errors():
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"  {name}: no such field" + did_you_mean(name, (f.name for f in fields(cls))))  # type: ignore[arg-type]
        else:
            lines.append(f"  {name}: {problem['msg']} (found {problem['input']!r})")
    return "\n".join([*lines, f"  fields: {known}"])


_make_dataclass(Recipe)  # the base has fields too (batch_size, eval_every)


def recipe_ref(recipe: Recipe | type[Recipe]) -> str:
    """Where the recipe's class is found again, as ``module:Class``.

    Under ``python -m jobs.digits`` the class lives in ``__main__`` but is recorded as ``jobs.digits:Digits``.
    A class made in a notebook cell or a function stays ``__main__:Name``: it trains, but cannot be registered.
    """
    cls = recipe if isinstance(recipe, type) else type(recipe)
    module = cls.__module__
    if module == "__main__":
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name if spec is not None and spec.name else module
    return f"{module}:{cls.__qualname__}"


def load_recipe(ref: str) -> type[Recipe]:
    """Find a recipe class by ``module`` (which must define exactly one) or ``module:Class``. Imports the module.

    Raises:
        NotFoundError: no such module or class, or a module with none or several recipes and no ``:Class``.
        RecipeError: the module itself fails to import; its traceback is in ``traceback_text``.
    """
    module_name, _, class_name = ref.partition(":")
    module = _import(module_name)
    if class_name:
        found = getattr(module, class_name, None)
        if not (isinstance(found, type) and issubclass(found, Recipe)):
            raise NotFoundError(
                f"{module_name} has no recipe {class_name!r}; it has: {', '.join(_names(module)) or 'none'}"
                + did_you_mean(class_name, _names(module))
            )
        return found
    own = _own_recipes(module)
    if len(own) != 1:
        raise NotFoundError(
            f"{module_name} defines no recipe (a subclass of shoal.Recipe)"
            if not own
            else f"{module_name} defines several recipes; say which: "
            + ", ".join(f"{module_name}:{c.__name__}" for c in own)
        )
    return own[0]


def _import(module_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        if err.name is not None and (module_name == err.name or module_name.startswith(err.name + ".")):
            raise NotFoundError(
                f"no module {module_name!r} on the path; run from the project's folder, "
                f"and give a dotted name such as jobs.digits{_similar_module(module_name)}"
            ) from None
        raise _import_failure(module_name, err) from err
    except (ValueError, TypeError):
        raise NotFoundError(
            f"{module_name!r} is not a module name; give one such as jobs.digits{_similar_module(module_name)}"
        ) from None
    except Exception as err:
        raise _import_failure(module_name, err) from err


def _similar_module(name: str) -> str:
    """A hint for a file's path (jobs/digits.py), and for a name like one of its neighbours'; empty for others."""
    dotted = name.removesuffix(".py").replace("/", ".").strip(".")
    if dotted != name:
        return f"; did you mean {dotted}?"
    package = name.rpartition(".")[0]
    folders = getattr(sys.modules.get(package), "__path__", [])
    return did_you_mean(name, [f"{package}.{module.name}" for module in pkgutil.iter_modules(folders)])


def _import_failure(module_name: str, err: Exception) -> RecipeError:
    import traceback

    return RecipeError(
        f"importing {module_name} failed: {type(err).__name__}: {err}",
        traceback_text=traceback.format_exc(),
    )


def _own_recipes(module: Any) -> list[type[Recipe]]:
    return [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and issubclass(c, Recipe)
        and c is not Recipe
        and c.__module__ == module.__name__
    ]


def _names(module: Any) -> list[str]:
    return [c.__name__ for c in _own_recipes(module)]


def field_values(recipe: Recipe) -> dict[str, Any]:
    """The recipe's hyperparameters as JSON-able values, in the order they were declared."""
    values = {f.name: getattr(recipe, f.name) for f in fields(recipe)}  # type: ignore[arg-type]
    return _fields_model(type(recipe)).model_validate(values).model_dump(mode="json")


def from_fields(cls: type[Recipe], values: Mapping[str, Any]) -> Recipe:
    """The recipe with these field values, as `field_values` gave them.

    Raises:
        RecipeError: a field is unknown or has a value of the wrong type.
    """
    return cls(**values)


def replace(recipe: Recipe, **changes: Any) -> Recipe:
    """A copy with some fields changed, validated like a new one."""
    return from_fields(type(recipe), {**field_values(recipe), **changes})


def parse_fields(cls: type[Recipe], assignments: list[str]) -> Recipe:
    """The recipe from shell words such as ``lr=1e-3``; pydantic turns the text into the field's type.

    Raises:
        RecipeError: a word without ``=``, a field that is named twice or unknown, or text that does not fit its type.
    """
    values: dict[str, str] = {}
    for word in assignments:
        name, equals, text = word.partition("=")
        if not equals:
            raise RecipeError(f"{word!r} is not of the form field=value, such as lr=1e-3")
        if name in values:
            raise RecipeError(f"{name}: given twice, as {values[name]!r} and {text!r}; keep one")
        values[name] = text
    return from_fields(cls, values)
