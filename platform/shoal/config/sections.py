"""``cluster.yaml`` as frozen models.

A field's docstring is its documentation, in editors and in docs/cluster-yaml.md.

Only what one field or one section can know about itself is checked here; what sections owe each other is
in ``checks``. So a ``ClusterConfig`` can be rebuilt anywhere (``ClusterConfig.from_dict``), whatever machine
it was made for.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import PydanticCustomError

from shoal.config.values import AtLeast, Duration, Gpus, Interval, Range, Size

# A DNS label: Kubernetes names, Ray resource names and environment variables all accept it.
Name = Annotated[str, StringConstraints(pattern="^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=1)]
PositiveRange = Annotated[Range, AtLeast(1)]
PositiveSize = Annotated[Size, AtLeast(1)]
PositiveDuration = Annotated[Duration, AtLeast(Duration(0.001))]

NOT_YET = "x-not-yet"
"""Marks, in the JSON Schema, a field that is read and checked while nothing acts on it."""
NotYet = Field(json_schema_extra={NOT_YET: True})
Priority = Annotated[int, Field(ge=0, le=1000), NotYet]


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise PydanticCustomError("shoal_value", "{text}", {"text": message})


def _storage(value: str) -> str:
    _check(value.strip() != "", "empty; write a folder such as .shoal")
    _check("://" not in value, "only folders so far, no object stores; write a folder such as .shoal")
    _check("\0" not in value, "a folder's name holds no NUL character; write a folder such as .shoal")
    try:
        Path(value).expanduser()
    except RuntimeError:
        _check(
            False,
            f"nobody here is called {value.split('/')[0].removeprefix('~')!r}; write a folder such as .shoal",
        )
    return value


def _tracking(value: str) -> str:
    _check(
        "@" not in value,
        "no passwords here; MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
    )
    message = "not a tracking server; write http://host:port or sqlite:///file.db"
    _check(re.fullmatch(r"(https?://[^/\s]+(/\S*)?|sqlite:///.+)", value) is not None, message)
    return value


def _host(value: str) -> str:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        message = "not a host; write an address such as 127.0.0.1, or a host name, without http:// or a port"
        # All digits and dots is an address that was mistyped, never a name.
        is_name = re.fullmatch(r"(?=.*[A-Za-z])[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", value)
        _check(is_name is not None, message)
    return value


Host = Annotated[str, AfterValidator(_host)]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Head(Section):
    """The machine that coordinates the cluster."""

    cpu: Count = 2
    """CPUs of the head."""
    memory: PositiveSize = Size(4 * 2**30)
    """Memory of the head."""


class Pool(Section):
    """Machines of one kind."""

    nodes: Range = Range(1, 1)
    """How many machines, at least and at most."""
    cpu: Count
    """CPUs of each machine."""
    memory: PositiveSize | None = None
    """Memory of each machine; unset where it does not matter."""
    gpu: Gpus | None = None
    """GPUs of each machine, as KIND:COUNT or COUNT; unset for none."""
    spot: Annotated[bool, NotYet] = False
    """Whether the machines may be taken away at any time, for a lower price."""
    idle: Annotated[Duration | None, NotYet] = None
    """How long a machine stays without work before it is given back; unset for never."""

    @property
    def max_cpus(self) -> int:
        """CPUs of the pool at its largest."""
        return self.nodes.max * self.cpu

    @property
    def max_gpus(self) -> int:
        """GPUs of the pool at its largest."""
        return self.nodes.max * self.gpu.count if self.gpu else 0


class Train(Section):
    """Defaults of training runs; a run may override each."""

    workers: PositiveRange = Range(1, 1)
    """Workers of a run. It starts with as many as are free, within these bounds, and takes more when room becomes
    free; one worker holds one GPU in a pool with GPUs, else one CPU."""
    pool: Name | None = None
    """Pool that the workers run in; unset for any CPU of the cluster."""
    checkpoint_every: Interval = Interval(30)
    """Time between checkpoints, which is the most work that a crash can cost; `auto` for as often as costs 1 % of
    the training's time, from 10s to 10m."""
    keep: Count = 3
    """How many of the newest checkpoints are kept, besides the best ones."""
    keep_best: Count = 1
    """How many of the best checkpoints are kept, by the recipe's objective on validation data."""
    exact: bool = False
    """Whether a run's weights are the same bits on any number of workers (docs/exact.md); sweeps stay fast."""
    shards: Count = 8
    """Of an exact run, into how many shards every batch is divided; it is the most workers the run can have."""
    strategy: Literal["ddp", "fsdp", "hybrid"] = "ddp"
    """What every worker holds: the whole model and optimizer, its part of them, or its part of its machine's copy."""
    on_nan: Literal["fail", "skip", "rollback"] = "fail"
    """At a NaN or infinite loss: end the run, skip the batch, or skip it from the last checkpoint on."""
    retries: Annotated[int, Field(ge=0)] = 5
    """How often within an hour a run replaces lost workers before it gives up."""
    priority: Priority = 50
    """Who goes first when the cluster is full; higher wins."""


class Tune(Section):
    """Defaults of sweeps; a sweep may override each."""

    trials: Count = 16
    """Trials of a sweep."""
    concurrent: Count = 4
    """Trials that run at the same time, at most; fewer when less is free."""
    priority: Priority = 20
    """Who goes first when the cluster is full; higher wins."""


class Reserve(Section):
    """What serving never lends to training."""

    cpu: Annotated[float, Field(ge=0)] = 0.0
    """CPUs kept for serving."""
    gpu: Annotated[int, Field(ge=0)] = 0
    """GPUs kept for serving."""
    memory: Size = Size(0)
    """Memory kept for serving."""


class Serve(Section):
    """How apps are served."""

    host: Host = "127.0.0.1"
    """Address that apps listen on. Anything but loopback needs `keys_file`."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port that apps listen on; 0 picks a free one when the cluster starts."""
    replicas: PositiveRange = Range(1, 1)
    """Processes of an app; it grows and shrinks within these bounds with its load."""
    request_timeout: PositiveDuration = Duration(30)
    """How long a request may take before it is answered with 504."""
    max_queue: Count = 200
    """Requests inside one replica at once, those being answered included; more get 503 and Retry-After."""
    batch: Count = 32
    """Requests that a replica answers in one pass of the model, at most."""
    batch_wait: Duration = Duration(0)
    """How long a request may wait for others to share its pass; 0s for not at all."""
    max_body: PositiveSize = Size(8 * 2**20)
    """Largest request body; larger ones are answered with 413."""
    keys_file: str | None = None
    """File with API keys, from the folder of cluster.yaml; unset asks for none, on loopback only."""
    priority: Priority = 100
    """Who goes first when the cluster is full; higher wins."""
    reserve: Annotated[Reserve, NotYet] = Reserve()
    """What is never lent to training."""


class Security(Section):
    """Who may use the cluster."""

    auth: Literal["token"] = "token"
    """How clients show who they are: a token in a file that only its owner reads."""


class LocalTarget(Section):
    """This machine stands in for the head and every pool; GPUs that it lacks are dropped."""

    cpu: Count | None = None
    """Logical CPUs to hand out, also more than there are; unset for as many as this machine has."""


class OnpremTarget(Section):
    """Machines that are reached over ssh."""

    hosts: Annotated[tuple[Host, ...], Field(min_length=1, strict=False)]
    """Host names or addresses; the first is the head."""
    ssh_user: Annotated[str, StringConstraints(min_length=1)]
    """User to log in as."""


class K8sTarget(Section):
    """A Kubernetes cluster with the KubeRay operator."""

    namespace: Name = "default"
    """Namespace to create everything in."""
    image: Annotated[str, StringConstraints(min_length=1)]
    """Container image with Ray and the project's dependencies."""


class Targets(Section):
    """Settings of each kind of target."""

    local: LocalTarget = LocalTarget()
    """This machine."""
    onprem: Annotated[OnpremTarget | None, NotYet] = None
    """Machines that are reached over ssh."""
    k8s: Annotated[K8sTarget | None, NotYet] = None
    """A Kubernetes cluster."""


class ClusterConfig(Section):
    """A shoal cluster, whole: what it is made of, what its jobs and apps default to, and where it runs."""

    version: Literal[1]
    """Version of this file's format."""
    name: Name
    """Name of the cluster."""
    head: Head = Head()
    """The machine that coordinates the cluster."""
    pools: Annotated[dict[Name, Pool], Field(json_schema_extra={"additionalProperties": False})] = {}
    """Machines that do the work, by name of their kind; without any, the head does it."""
    storage: Annotated[str, AfterValidator(_storage)] = ".shoal"
    """Folder of runs, checkpoints and models, from the folder of cluster.yaml."""
    tracking: Annotated[str, AfterValidator(_tracking)] | None = None
    """MLflow server, as http://host:port or sqlite:///file.db; unset for a database in the storage."""
    train: Train = Train()
    """Defaults of training runs."""
    tune: Tune = Tune()
    """Defaults of sweeps."""
    serve: Serve = Serve()
    """How apps are served."""
    security: Security = Security()
    """Who may use the cluster."""
    target: Literal["local", "onprem", "k8s"] = "local"
    """Where the cluster runs; `--target` overrides it."""
    targets: Targets = Targets()
    """Settings of each kind of target."""

    def storage_path(self, project: Path) -> Path:
        """The absolute storage folder; ``project`` is the folder of the file."""
        return _absolute(project, self.storage)

    def tracking_uri(self, project: Path) -> str:
        """Where MLflow keeps its record: ``tracking`` made absolute, or a database in the storage."""
        if self.tracking is None:
            return f"sqlite:///{self.storage_path(project) / 'tracking' / 'mlflow.db'}"
        if self.tracking.startswith("sqlite:///"):
            return f"sqlite:///{_absolute(project, self.tracking.removeprefix('sqlite:///'))}"
        return self.tracking

    def keys_path(self, project: Path) -> Path | None:
        """The absolute path of ``serve.keys_file``, or None when no keys are asked for."""
        return None if self.serve.keys_file is None else _absolute(project, self.serve.keys_file)

    def as_dict(self) -> dict[str, Any]:
        """The whole config, defaults included, as JSON-able values; ``from_dict`` gives it back."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild a config that ``as_dict`` gave.

        Raises:
            pydantic.ValidationError: it is not such a dict; files of people go through ``load``.
        """
        return cls.model_validate(dict(values))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``. Names but ``localhost`` count as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _absolute(project: Path, path: str) -> Path:
    # resolve() alone would make a relative project relative to the caller's folder at some later time.
    return (project.resolve() / Path(path).expanduser()).resolve()
