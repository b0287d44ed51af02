"""Where workers meet: generations, seats, and every way in which there is no group to join."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from shoal.errors import PeerLost
from shoal.train import rendezvous as rendezvous_module
from shoal.train.rendezvous import Attendance, Place, Rendezvous, places

TWO = places(["a", "a"])


@pytest.fixture
def meeting() -> Rendezvous:
    return Rendezvous("127.0.0.1")


@pytest.fixture
def attend(meeting: Rendezvous, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Attendance]:
    """A worker by its rank of two; joining a group of torch's is left out: one process has only one."""
    monkeypatch.setattr(rendezvous_module.dist, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(rendezvous_module.dist.distributed_c10d, "_set_pg_timeout", lambda *_: None)
    monkeypatch.setattr(rendezvous_module, "GATHER_TIMEOUT_S", 20.0)
    return lambda rank: Attendance(meeting.seat(TWO[rank], backend="gloo", timeout_s=20.0))


class Joining(threading.Thread):
    """`join` beside the test, and how it ended."""

    def __init__(self, attendance: Attendance) -> None:
        super().__init__(daemon=True)
        self._attendance = attendance
        self._error: PeerLost | None = None
        self.start()

    def run(self) -> None:
        try:
            self._attendance.join()
        except PeerLost as error:
            self._error = error

    def outcome(self) -> str:
        self.join(30)
        assert not self.is_alive()
        return "" if self._error is None else str(self._error)

    def is_waiting(self) -> bool:
        self.join(0.2)
        return self.is_alive()


def outcomes(*joining: Joining) -> list[str]:
    """How each ended; an empty text is a group joined."""
    return [one.outcome() for one in joining]


def test_places_count_workers_by_node() -> None:
    assert places(["a", "b", "a", "b", "b"]) == [
        Place(0, 5, 0, 2, 0),
        Place(1, 5, 0, 3, 1),
        Place(2, 5, 1, 2, 0),
        Place(3, 5, 1, 3, 1),
        Place(4, 5, 2, 3, 1),
    ]


def test_a_seat_names_the_usual_variables(meeting: Rendezvous) -> None:
    environment = meeting.seat(places(["a", "b", "b"])[2], backend="gloo", timeout_s=1.0).environment()
    assert environment["MASTER_ADDR"] == "127.0.0.1"
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK")
    assert [environment[name] for name in names] == ["2", "3", "1", "2", "1"]


def test_workers_meet_when_they_are_called_and_all_there(
    meeting: Rendezvous, attend: Callable[[int], Attendance]
) -> None:
    first, late = Joining(attend(0)), attend(1)
    assert first.is_waiting()
    meeting.call()
    assert first.is_waiting()
    assert outcomes(first, Joining(late)) == ["", ""]


def test_a_survivor_meets_the_replacement_at_the_next_call_not_at_that_of_the_dead(
    meeting: Rendezvous, attend: Callable[[int], Attendance]
) -> None:
    survivor, dead = attend(0), attend(1)
    meeting.call()
    assert outcomes(Joining(survivor), Joining(dead)) == ["", ""]
    survivor.leave()
    both = Joining(survivor), Joining(attend(1))
    assert [one.is_waiting() for one in both] == [True, True]
    meeting.call()
    assert outcomes(*both) == ["", ""]


def test_who_waits_for_one_that_died_before_it_came_goes_on_to_the_next_call(
    meeting: Rendezvous, attend: Callable[[int], Attendance]
) -> None:
    waiting = Joining(attend(0))
    meeting.call()
    assert waiting.is_waiting()
    replacement = Joining(attend(1))
    meeting.call()
    assert outcomes(waiting, replacement) == ["", ""]


def test_who_cannot_form_the_group_as_one_died_with_its_seat_waits_for_the_next_call(
    meeting: Rendezvous, attend: Callable[[int], Attendance], monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_out(*_: object, **__: object) -> None:
        raise RuntimeError("timed out")

    survivor, dead = attend(0), attend(1)
    with monkeypatch.context() as patch:
        patch.setattr(rendezvous_module.dist, "init_process_group", time_out)
        meeting.call()
        dead._store.set("here/1/1", "")
        waiting = Joining(survivor)
        assert waiting.is_waiting()
    replacement = Joining(attend(1))
    meeting.call()
    assert outcomes(waiting, replacement) == ["", ""]


def test_everyone_is_sent_home(meeting: Rendezvous, attend: Callable[[int], Attendance]) -> None:
    waiting = Joining(attend(0))
    meeting.close()
    assert waiting.outcome() == "the group will not meet again"


def test_when_all_lost_each_other_nobody_waits(
    meeting: Rendezvous, attend: Callable[[int], Attendance]
) -> None:
    both = [attend(0), attend(1)]
    meeting.call()
    assert outcomes(*[Joining(one) for one in both]) == ["", ""]
    both[0].leave()
    waiting = Joining(both[0])
    assert waiting.is_waiting()
    both[1].leave()
    assert waiting.outcome() == "every worker lost the others"


def test_a_call_that_never_comes_is_given_up(
    meeting: Rendezvous, attend: Callable[[int], Attendance], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous_module, "GATHER_TIMEOUT_S", 0.1)
    one = attend(0)
    assert Joining(one).outcome() == "a worker waited 0.1 s for generation 1 of its group to be called"
    meeting.call()
    assert Joining(one).outcome() == "a worker waited 0.1 s for the other workers of generation 1"


def test_a_controller_that_is_gone_is_a_lost_peer(attend: Callable[[int], Attendance]) -> None:
    attendance = attend(0)
    attendance._store = _Gone()
    with pytest.raises(PeerLost, match="no group to join"):
        attendance.join()


class _Gone:
    """A store whose host does not answer."""

    def get(self, key: str) -> bytes:
        raise RuntimeError(f"connection reset, {key}")


def test_a_call_sees_none_of_what_the_interrupted_one_did(monkeypatch: pytest.MonkeyPatch) -> None:
    class Present:
        def __init__(self, seat: object) -> None: ...
        def join(self) -> None: ...
        def leave(self) -> None: ...

    seen: list[list[str]] = []

    def train(config: dict[str, list[str]]) -> None:
        seen.append(list(config["marks"]))
        config["marks"].append("touched")
        if len(seen) < 3:
            raise PeerLost("gone")

    monkeypatch.setattr(rendezvous_module, "Attendance", Present)
    monkeypatch.setattr(rendezvous_module, "_seat", object())
    rendezvous_module.run_in_generations(train, {"marks": ["new"]})
    assert seen == [["new"]] * 3
