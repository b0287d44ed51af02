"""Bad files: the exact words of every problem, all of them at once, and nothing else."""

# ruff: noqa: E501 - messages stay whole, so that they can be searched for

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from config_reading import Read

from shoal.config import Machine, load
from shoal.errors import ConfigError

LEAST = "version: 1\nname: x\n"
POOLS = "pools: {cpu: {nodes: 0..4, cpu: 8, memory: 32Gi}, gpu: {nodes: 0..2, cpu: 8, gpu: L4:2}}\n"
K8S = "target: k8s\ntargets: {k8s: {image: i}}\n"
TOP = "version, name, head, pools, storage, tracking, train, tune, serve, security, target, targets"
NAME = "a name has 1 to 40 of a-z, 0-9 and -, begins with a letter and does not end with -"

# What follows the two lines of LEAST, and each problem as it is printed.
BAD: dict[str, tuple[str, list[str]]] = {
    # Keys
    "unknown key": (
        "heda: {}",
        [f"heda: unknown key; did you mean head? Valid keys: {TOP} (found a mapping, line 3)"],
    ),
    "key of another section": (
        "keep: 3",
        [f"keep: unknown key; did you mean train.keep? Valid keys: {TOP} (found 3, line 3)"],
    ),
    "key of several sections": (
        "priority: 3",
        [
            "priority: unknown key; did you mean train.priority or tune.priority or serve.priority? "
            f"Valid keys: {TOP} (found 3, line 3)"
        ],
    ),
    "unknown key inside": (
        "tune:\n  trails: 3",
        [
            "tune.trails: unknown key; did you mean trials? Valid keys: trials, concurrent, priority (found 3, line 4)"
        ],
    ),
    "unknown key, nothing near": (
        "security: {zzz: 1}",
        ["security.zzz: unknown key; valid keys: auth (found 1, line 3)"],
    ),
    "key twice": (
        "tune:\n  trials: 3\n  trials: 4",
        ["tune.trials: given twice, first on line 4; keep one (line 5)"],
    ),
    "key twice, and merged": (
        "pools:\n  a: &a {cpu: 1}\n  b: {<<: *a, cpu: 2,\n    cpu: 3}",
        ["pools.b.cpu: given twice, first on line 5; keep one (line 6)"],
    ),
    "wrong value over a merged one": (
        "pools:\n  a: &a {cpu: 1}\n  b:\n    <<: *a\n    cpu: many",
        ["pools.b.cpu: must be a whole number (found 'many', line 7)"],
    ),
    "section twice": (
        "head: {cpu: 1}\nhead: {cpu: 2}",
        ["head: given twice, first on line 3; keep one (line 4)"],
    ),
    "key that is no text": ("1: 2", ["1: a key must be text; quote it (line 3)"]),
    "pool name that is no text": (
        "pools: {1: {cpu: 2}}",
        ["pools.1: a name must be text; quote it (line 3)"],
    ),
    "pool name": ("pools: {GPU_1: {cpu: 2}}", [f"pools.GPU_1: {NAME} (line 3)"]),
    "missing": (
        "pools:\n  a: {nodes: 2}",
        ["pools.a.cpu: required, but not given: CPUs of each machine (line 4)"],
    ),
    # Types: nothing is converted silently
    "bool for int": ("train: {keep: true}", ["train.keep: must be a whole number (found true, line 3)"]),
    "float for int": ("train: {keep: 2.0}", ["train.keep: must be a whole number (found 2.0, line 3)"]),
    "text for int": ("train: {keep: '2'}", ["train.keep: must be a whole number (found '2', line 3)"]),
    "text for bool": (
        "pools: {a: {cpu: 1, spot: yes}}",
        ["pools.a.spot: must be true or false (found 'yes', line 3)"],
    ),
    "bool for float": (
        "serve: {reserve: {cpu: true}}",
        ["serve.reserve.cpu: must be a number (found true, line 3)"],
    ),
    "NaN": (
        "serve: {reserve: {cpu: .nan}}",
        ["serve.reserve.cpu: must be a finite number (found nan, line 3)"],
    ),
    "int for text": ("storage: 5", ["storage: must be text; quote it (found 5, line 3)"]),
    "list for section": (
        "tune: [1]",
        ["tune: must be a mapping of trials, concurrent, priority (found a list, line 3)"],
    ),
    "empty section": (
        "tune:",
        ["tune: must be a mapping of trials, concurrent, priority (found nothing, line 3)"],
    ),
    "text for pools": (
        "pools: cpu",
        ["pools: must be a mapping of names, such as {cpu: {nodes: 1..4, cpu: 8}} (found 'cpu', line 3)"],
    ),
    "text for list": (
        "targets: {onprem: {hosts: h, ssh_user: u}}",
        ["targets.onprem.hosts: must be a list, such as [a, b] (found 'h', line 3)"],
    ),
    "item of a list": (
        "targets:\n  onprem:\n    ssh_user: u\n    hosts:\n    - a\n    - 5\n    - http://c",
        [
            "targets.onprem.hosts.1: must be text; quote it (found 5, line 8)",
            "targets.onprem.hosts.2: not a host; write an address such as 127.0.0.1, or a host name, "
            "without http:// or a port (found 'http://c', line 9)",
        ],
    ),
    "empty list": (
        "targets: {onprem: {hosts: [], ssh_user: ''}}",
        [
            "targets.onprem.hosts: must not be empty (found a list, line 3)",
            "targets.onprem.ssh_user: must not be empty (found '', line 3)",
        ],
    ),
    # Values
    "range upside down": (
        "serve: {replicas: 4..1}",
        ["serve.replicas: the range is upside down; write 1..4 (found '4..1', line 3)"],
    ),
    "no workers": ("train: {workers: 0..4}", ["train.workers: must be at least 1 (found '0..4', line 3)"]),
    "duration without unit": (
        "train: {checkpoint_every: 30}",
        ["train.checkpoint_every: a duration needs a unit; write 30s for seconds (found 30, line 3)"],
    ),
    "duration of nothing": (
        "serve: {request_timeout: 0s}",
        ["serve.request_timeout: must be at least 1ms (found '0s', line 3)"],
    ),
    "size": (
        "serve: {max_body: 8MB}",
        [
            "serve.max_body: no such unit 'MB', only Ti, T, Gi, G, Mi, M, Ki, K; did you mean 8M? "
            "(found '8MB', line 3)"
        ],
    ),
    "port": ("serve: {port: 70000}", ["serve.port: must be at most 65535 (found 70000, line 3)"]),
    "negative": ("train: {retries: -1}", ["train.retries: must be at least 0 (found -1, line 3)"]),
    "host": (
        "serve: {host: 127.0.0.256}",
        [
            "serve.host: not a host; write an address such as 127.0.0.1, or a host name, without http:// or a port "
            "(found '127.0.0.256', line 3)"
        ],
    ),
    "auth": ("security: {auth: none}", ["security.auth: must be token (found 'none', line 3)"]),
    "object store": (
        "storage: s3://b/p",
        [
            "storage: only folders so far, no object stores; write a folder such as .shoal "
            "(found 's3://b/p', line 3)"
        ],
    ),
    "nobody's folder": (
        "storage: ~no-such-user/x",
        [
            "storage: nobody here is called 'no-such-user'; write a folder such as .shoal "
            "(found '~no-such-user/x', line 3)"
        ],
    ),
    "NUL": (
        'storage: "a\\0b"',
        [
            "storage: a folder's name holds no NUL character; write a folder such as .shoal "
            "(found 'a\\x00b', line 3)"
        ],
    ),
    "tracking": (
        "tracking: mlruns",
        [
            "tracking: not a tracking server; write http://host:port or sqlite:///file.db (found 'mlruns', line 3)"
        ],
    ),
    "long value": (
        f"tracking: {'m' * 99}",
        [
            "tracking: not a tracking server; write http://host:port or sqlite:///file.db "
            f"(found '{'m' * 56}..., line 3)"
        ],
    ),
    "target": (
        "target: loacl",
        ["target: must be local, onprem or k8s; did you mean local? (found 'loacl', line 3)"],
    ),
    # Between sections
    "unknown pool": (
        POOLS + "train: {pool: gpus}",
        ["train.pool: no such pool; pools are cpu, gpu; did you mean gpu? (found 'gpus', line 4)"],
    ),
    "no pools": (
        "train: {pool: gpu}",
        ["train.pool: no such pool; the file has no pools (found 'gpu', line 3)"],
    ),
    "workers on this machine": (
        "train: {workers: 3..4}",
        [
            "train.workers: 3 workers can never run: target local has 2 CPUs, one for each worker; "
            "ask for less or raise targets.local.cpu (found 3..4, line 3)"
        ],
    ),
    "workers of a GPU pool": (
        POOLS + K8S + "train: {workers: 1..8, pool: gpu}",
        [
            "train.workers: 8 workers can never run: pool gpu has 4 GPUs, one for each worker; "
            "ask for less or raise pools.gpu.nodes (found 1..8, line 6)"
        ],
    ),
    "workers of a CPU pool": (
        POOLS + K8S + "train: {workers: 33, pool: cpu}",
        [
            "train.workers: 33 workers can never run: pool cpu has 32 CPUs, one for each worker; "
            "ask for less or raise pools.cpu.nodes (found 33, line 6)"
        ],
    ),
    "workers of no pool": (
        K8S + "train: {workers: 1..3}",
        [
            "train.workers: 3 workers can never run: the cluster has 2 CPUs, one for each worker; "
            "ask for less or raise the nodes of a pool (found 1..3, line 5)"
        ],
    ),
    "reserve on this machine": (
        "serve: {reserve: {cpu: 2.5, gpu: 1, memory: 9Gi}}",
        [
            "serve.reserve.cpu: more than there is: target local has 2 CPUs in all; "
            "reserve less or raise targets.local.cpu (found 2.5, line 3)",
            "serve.reserve.gpu: more than there is: target local has 0 GPUs in all; reserve less (found 1, line 3)",
            "serve.reserve.memory: more than there is: target local has 8.0Gi in all; reserve less (found 9Gi, line 3)",
        ],
    ),
    "reserve elsewhere": (
        POOLS + K8S + "serve: {reserve: {cpu: 51, gpu: 5, memory: 9Ti}}",  # memory of pool gpu is not known
        [
            "serve.reserve.cpu: more than there is: the cluster has 50 CPUs in all; "
            "reserve less or raise the nodes of a pool (found 51, line 6)",
            "serve.reserve.gpu: more than there is: the cluster has 4 GPUs in all; "
            "reserve less or raise the nodes of a pool (found 5, line 6)",
        ],
    ),
    "open without keys": (
        "serve: {host: 0.0.0.0}",
        [
            "serve.host: others could reach the apps without a key; set serve.keys_file, or bind 127.0.0.1 "
            "(found '0.0.0.0', line 3)"
        ],
    ),
    "target without settings": (
        "target: k8s",
        ["target: this target needs its settings; add targets.k8s, or choose local (found 'k8s', line 3)"],
    ),
}


def problems_of(error: ConfigError) -> list[str]:
    return [str(problem) for problem in error.problems]


@pytest.mark.parametrize("case", BAD)
def test_bad_file(case: str, read: Read) -> None:
    text, expected = BAD[case]
    with pytest.raises(ConfigError) as caught:
        read(LEAST + text)
    assert problems_of(caught.value) == expected


def test_every_problem_at_once_in_the_order_of_the_file(read: Read, tmp_path: Path) -> None:
    text = (
        "version: 2\nhead: {cpu: 0}\npools: {cpu: {nodes: 1}, old: 5}\n"
        "train: {pool: gpu, keep: x}\nserve: {host: 10.0.0.1, port: -1}\ntune: {trials: 1, trials: 2}"
    )
    with pytest.raises(ConfigError) as caught:
        read(text, overrides=["tune.trials=none", "train.retries=-1"])
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/cluster.yaml: 12 problems",
        "  version: must be 1 (found 2, line 1)",
        "  head.cpu: must be at least 1 (found 0, line 2)",
        "  pools.cpu.cpu: required, but not given: CPUs of each machine (line 3)",
        "  pools.old: must be a mapping of nodes, cpu, memory, gpu, spot, idle (found 5, line 3)",
        "  train.keep: must be a whole number (found 'x', line 4)",
        "  train.pool: no such pool; pools are cpu (found 'gpu', line 4)",
        "  serve.port: must be at least 0 (found -1, line 5)",
        "  serve.host: others could reach the apps without a key; set serve.keys_file, or bind 127.0.0.1 "
        "(found '10.0.0.1', line 5)",
        "  tune.trials: given twice, first on line 6; keep one (line 6)",
        "  name: required, but not given: Name of the cluster",
        "  train.retries: must be at least 0 (found -1, --set)",
        "  tune.trials: must be a whole number (found 'none', --set)",
    ]


def test_a_broken_section_hides_only_what_was_concluded_from_it(read: Read) -> None:
    """A pool that is itself wrong is neither unknown nor too small."""
    text = (
        LEAST
        + K8S
        + "pools: {a: {cpu: many}, b: 5}\ntrain: {pool: b, workers: 99}\nserve: {reserve: {cpu: 99}}"
    )
    with pytest.raises(ConfigError) as caught:
        read(text)
    assert [problem.path for problem in caught.value.problems] == ["pools.a.cpu", "pools.b"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "(file): empty; the least it needs is `version: 1` and `name: my-cluster`"),
        (b"- 1", "(file): must be a mapping of sections, such as `train: {workers: 1..4}`"),
        (b"a: [1", "(file): not valid YAML: expected ',' or ']', but got '<stream end>' (line 1, column 6)"),
        (b"a: 1\n---\nb: 2", "(file): not valid YAML: but found another document (line 2, column 1)"),
        (b"a: !!python/object:os.system x", None),
        *(
            (
                f"a: !!{tag} {text}".encode(),
                f"(file): not valid YAML: not a value of the tag 'tag:yaml.org,2002:{tag}'; leave the tag out "
                "(line 1, column 4)",
            )
            for tag, text in (
                *((tag, "x") for tag in ("int", "float", "bool", "timestamp")),
                ("float", '""'),
                ("float", "1:" * 5000 + "1"),
            )
        ),
        (b"\xff\xfe\xfa", "(file): not valid YAML: it holds bytes that are not UTF-8 text"),
        (b"? [1]\n: 2", "(file): not valid YAML: found unhashable key (line 1, column 3)"),
        (b"a: " + b"[" * 1000, "(file): not valid YAML: nested too deeply"),
        (b"#" * (2**20 + 1), "(file): larger than 1 MiB; this is not a cluster.yaml"),
    ],
)
def test_files_that_are_no_cluster_yaml(content: bytes, expected: str | None, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load(file, env={})
    assert len(caught.value.problems) == 1
    if expected is None:  # names the tag, in PyYAML's words
        expected = problems_of(caught.value)[0]
        assert "could not determine a constructor" in expected
    assert problems_of(caught.value) == [expected]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load(tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"overrides": ["foo"]},
            "--set: write --set SECTION.FIELD=VALUE, such as --set train.workers=2 (found 'foo')",
        ),
        (
            {"overrides": ["a..b=1"]},
            "--set: write --set SECTION.FIELD=VALUE, such as --set train.workers=2 (found 'a..b=1')",
        ),
        ({"overrides": ["name.x=1"]}, "name.x: name has no parts to set (found 1, --set)"),
        ({"overrides": ["train.keep=[1"]}, "train.keep: the value is not valid YAML (found '[1', --set)"),
        ({"overrides": ["train.keep={x: 1}"]}, "train.keep: must be a whole number (found a mapping, --set)"),
        (
            {"overrides": ["tune={trials: x}"]},
            "tune.trials: must be a whole number (found 'x', --set)",
        ),
        (
            {"overrides": ["train.workers=3"]},
            "train.workers: 3 workers can never run: target local has 2 CPUs, one for each worker; "
            "ask for less or raise targets.local.cpu (found 3, --set)",
        ),
        (
            {"env": {"SHOAL_SET_TRAIN__KEPE": "1"}},
            "train.kepe: unknown key; did you mean keep? Valid keys: workers, pool, checkpoint_every, keep, "
            "keep_best, exact, shards, strategy, on_nan, retries, priority (found 1, SHOAL_SET_TRAIN__KEPE)",
        ),
        (
            {"env": {"SHOAL_SET_": "1"}},
            "SHOAL_SET_: write SHOAL_SET_SECTION__FIELD, such as SHOAL_SET_TRAIN__WORKERS=2",
        ),
        (
            {"target": "onprem"},
            "target: this target needs its settings; add targets.onprem, or choose local (found 'onprem', --target)",
        ),
        ({"target": "cloud"}, "target: must be local, onprem or k8s (found 'cloud', --target)"),
    ],
)
def test_bad_overrides_are_named_as_such(options: dict[str, object], expected: str, read: Read) -> None:
    with pytest.raises(ConfigError) as caught:
        read(LEAST, **options)
    assert problems_of(caught.value) == [expected]


def test_passwords_stay_out_of_the_file(read: Read) -> None:
    with pytest.raises(ConfigError, match="no passwords here"):
        read(LEAST + "tracking: http://me:secret@host:5000")


def test_anchors_that_grow_without_bound_are_refused_quickly(read: Read) -> None:
    levels = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))
    with pytest.raises(ConfigError) as caught:
        read(LEAST + f"a0: &a0 [x]\n{levels}\nloop: &loop [*loop]")
    assert len(caught.value.problems) == 31
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize(
    "text",
    [
        "a0: &a0 {x: 1, y: 1}\n"
        + "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 30)),
        "a: &a {" + ", ".join(f"k{i}: 1" for i in range(1000)) + "}\nb: {<<: [" + "*a, " * 10_000 + "]}",
        "a: &a {x: 1, <<: [" + "*a, " * 10 + "]}",
        "a: &a {x: 1, <<: &b {<<: *a}}",
    ],
    ids=["nested", "wide", "in itself", "in a circle"],
)
def test_merges_that_grow_without_bound_are_refused_quickly(text: str, read: Read) -> None:
    with pytest.raises(
        ConfigError, match=r"merge keys \(<<\) copy more than 10000 keys, or a mapping into itself"
    ):
        read(LEAST + text)


def test_an_override_has_the_same_bounds(read: Read) -> None:
    with pytest.raises(ConfigError, match=r"train\.workers: the value is not valid YAML"):
        read(LEAST, overrides=["train.workers=&a {x: 1, <<: [*a, *a]}"])


def test_checks_are_against_the_chosen_target(read: Read) -> None:
    text = LEAST + POOLS + "targets: {k8s: {image: i}}\ntrain: {workers: 1..5, pool: gpu}"
    assert read(text).train.workers.max == 5
    with pytest.raises(ConfigError, match="pool gpu has 4 GPUs"):
        read(text, target="k8s")
    assert read(
        text + "\nserve: {reserve: {memory: 1Ti}}",
        target="local",
        machine=Machine(num_cpus=1, memory_bytes=2**41),
    )


def test_the_error_crosses_processes_whole(read: Read) -> None:
    with pytest.raises(ConfigError) as caught:
        read(LEAST + "heda: 1")
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.problems) == (str(caught.value), caught.value.problems)
