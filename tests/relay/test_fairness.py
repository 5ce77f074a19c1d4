"""Users share gpu seconds, whatever their jobs look like; nobody waits for ever."""

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wire
from relay import fairness
from tests.relay.conftest import Relay
from tests.relay.double_gpu import BASE, DoubleGpu, held

ON_BOTH_DATABASES = True
COSTS = st.lists(st.floats(30, 36_000), min_size=2, max_size=6)  # of each user's jobs


@dataclass
class User:
    cost_s: float
    credit_s: float = 0.0
    waits_since: float = 0.0


def serve(users: dict[str, User], now: float) -> str:
    """One job, as the relay does it in the database."""
    heads = [
        fairness.Head(f"job-{name}", name, user.cost_s, user.waits_since, user.credit_s) for name, user in users.items()
    ]
    turn = fairness.turn(heads, now)
    assert turn
    for user in users.values():
        user.credit_s += turn.gain_s
    served = users[turn.head.owner]
    served.credit_s = fairness.paid_s(served.credit_s, served.cost_s)
    served.waits_since = now
    return turn.head.owner


def all_waiting(costs: list[float]) -> dict[str, User]:
    return {f"user-{number}": User(cost) for number, cost in enumerate(costs)}


@given(COSTS, st.integers(1, 300))
def test_shares_of_those_who_wait_differ_by_a_job_at_most(costs: list[float], rounds: int) -> None:
    users = all_waiting(costs)
    got_s = dict.fromkeys(users, 0.0)
    for _ in range(rounds):
        owner = serve(users, now=0.0)
        got_s[owner] += users[owner].cost_s
    assert max(got_s.values()) - min(got_s.values()) <= max(costs) * (1 + 1e-6)


@given(COSTS)
def test_everybody_is_served_though_the_others_never_stop(costs: list[float]) -> None:
    users = all_waiting(costs)
    most = sum(max(costs) / cost + 1 for cost in costs) + 1
    served = set[str]()
    for _ in range(int(most) + 1):
        served.add(serve(users, now=0.0))
    assert served == users.keys()


@given(COSTS, st.integers(1, 100))
def test_with_time_going_by_nobody_saves_credit_or_owes_more_than_a_job(costs: list[float], rounds: int) -> None:
    users, now = all_waiting(costs), 0.0
    for _ in range(rounds):
        owner = serve(users, now)
        now += users[owner].cost_s
        assert -users[owner].cost_s <= users[owner].credit_s <= 0


@given(st.floats(60, 1e6))
def test_a_long_job_comes_to_its_turn_though_new_users_bring_short_ones_for_ever(cost_s: float) -> None:
    long = fairness.Head("job-long", "patient", cost_s, 0.0, 0.0)
    now = 1.001 * cost_s / fairness.AGEING
    newcomer = fairness.Head("job-short", "newcomer", fairness.START_S, now, 0.0)
    at_first = fairness.turn([long, fairness.Head("job-short", "newcomer", fairness.START_S, 0.0, 0.0)], 0.0)
    assert at_first
    assert at_first.head.owner == "newcomer"
    turn = fairness.turn([long, newcomer], now)
    assert turn
    assert (turn.head, turn.gain_s) == (long, 0.0)


def test_equal_users_take_turns_the_longest_wait_first() -> None:
    users = {"ada": User(60, waits_since=-2), "bob": User(60, waits_since=-1)}
    assert [serve(users, now) for now in (0, 1, 2, 3)] == ["ada", "bob", "ada", "bob"]


def test_no_jobs_are_nobodys_turn() -> None:
    assert fairness.turn([], 0.0) is None


@pytest.mark.parametrize(("n_epochs", "times"), [(1, 1), (5, 5), ("auto", fairness.EPOCHS)])
def test_the_estimate_is_the_gpus_or_the_datas(n_epochs: int | str, times: int) -> None:
    size_s = 80_000 / fairness.BYTES_PER_S
    assert fairness.estimate_s(None, 80_000, n_epochs) == fairness.START_S + size_s * times
    assert fairness.estimate_s(500.0, 80_000, n_epochs) == 500.0


async def test_a_modest_user_waits_for_a_job_of_a_greedy_one_not_for_all(relay: Relay, gpu: DoubleGpu) -> None:
    made = await relay.http.post("/api/keys", json={"user": "modest", "name": "modest's"})
    greedy, modest = relay.openai, relay.client(made.json()["key"])
    owners = {}
    for who, client, n_jobs in (("greedy", greedy, 4), ("modest", modest, 1)):
        for _ in range(n_jobs):
            row = b'{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}\n'
            file = await client.files.create(file=("rows.jsonl", row), purpose="fine-tune")
            owners[(await client.fine_tuning.jobs.create(model=BASE, training_file=file.id)).id] = who
    order = []
    for _ in range(5):
        grant = await gpu.next_grant()
        order.append(owners[grant.job.job_id])
        assert (await gpu.succeed(grant)).status_code == 200
    await modest.close()
    assert order.index("modest") <= 2  # after the one that ran already, and at most one more


async def test_a_users_own_jobs_go_by_priority_and_then_by_age(relay: Relay, gpu: DoubleGpu) -> None:
    file, made = await relay.upload(), {}
    relay.clock.advance(relay.settings.alive_s + 1)  # nothing is handed out yet
    for name, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 5)):
        relay.clock.advance(0.1)
        asked: dict[str, Any] = {"model": BASE, "training_file": file, "priority": priority}
        job = (await relay.http.post("/v1/fine_tuning/jobs", json=asked)).json()
        assert job["priority"] == priority
        made[job["id"]] = name
    order = []
    for _ in made:
        grant = await gpu.next_grant()
        order.append(made[grant.job.job_id])
        assert (await gpu.succeed(grant)).status_code == 200
    assert order == ["high", "first", "second", "low"]


async def test_a_gpu_that_ends_soon_gets_no_new_job(relay: Relay, gpu: DoubleGpu) -> None:
    enrolling = gpu.enrol_request().model_copy(update={"runtime_ends_at": relay.clock() + 100})
    gpu.enrol_request = lambda *_: enrolling  # type: ignore[method-assign]
    assert (await gpu.enrol()).status_code == 200
    file = await relay.upload()
    job = await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=file)
    async with relay.gpu() as other:
        grant = await other.next_grant()
        assert grant.job.job_id == job.id
        assert (await other.beat(held(grant))).commands == []


async def test_a_gpu_that_drains_gives_its_job_back_and_gets_none(relay: Relay, gpu: DoubleGpu) -> None:
    job = await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())
    grant = await gpu.next_grant()
    drain = f"/api/gpus/{gpu.by.gpu_id}/drain"
    assert (await relay.http.post(drain)).status_code == 200
    assert (await gpu.beat(held(grant))).commands == [wire.Drain()]  # until it says that it does
    gpu.draining = True
    assert (await gpu.beat(held(grant))).commands == []
    release = wire.Release(fence=grant.fence, reason="drained")
    assert (await gpu.call("POST", f"/gpu/jobs/{job.id}/release", release)).status_code == 200
    waits = await relay.openai.fine_tuning.jobs.retrieve(job.id)
    assert waits.status == "queued"
    async with relay.gpu() as other:
        assert (await other.next_grant()).job.job_id == job.id
    second = await relay.openai.fine_tuning.jobs.create(model=BASE, training_file=await relay.upload())
    assert (await relay.http.delete(drain)).status_code == 200
    assert wire.Undrain() in (await gpu.beat()).commands
    gpu.draining = False
    assert (await gpu.next_grant()).job.job_id == second.id
