"""The queue's rule: first come, first served; a later request goes ahead only where it can delay nobody."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaker_sessions.executor import claims
from beaker_sessions.model import Claim, Gpu, Resources

GPUS = [Gpu(f"example.com/gpu={n}", "Example") for n in range(4)]


def test_requests_start_in_order_while_there_is_room():
    queue = [Resources(gpus=1), Resources(gpus=2), Resources(gpus=1)]
    assert claims.startable(queue, Resources(gpus=4)) == [0, 1, 2]
    assert claims.startable(queue, Resources(gpus=3)) == [0, 1]


def test_a_small_request_does_not_take_the_gpu_that_a_large_one_waits_for():
    assert claims.startable([Resources(gpus=4), Resources(gpus=1)], Resources(gpus=3)) == []


def test_a_request_that_needs_nothing_scarce_goes_ahead():
    queue = [Resources(gpus=4, cpus=4), Resources(cpus=2), Resources()]
    assert claims.startable(queue, Resources(gpus=1, cpus=6)) == [1, 2]
    assert claims.startable(queue, Resources(gpus=1, cpus=5)) == [2]


amounts = st.builds(Resources, gpus=st.integers(0, 3), cpus=st.integers(0, 4).map(float), memory=st.integers(0, 4))


@given(queue=st.lists(amounts, max_size=5), running=st.lists(amounts, max_size=3), spare=amounts)
def test_whoever_goes_ahead_delays_nobody_before_in_any_order_of_ends(queue, running, spare):
    """For every waiting request and every set of running sessions that might end: with or without the ones that went
    ahead of it, it could start on the same ends."""
    starts = set(claims.startable(queue, spare))
    for waiting in set(range(len(queue))) - starts:
        ahead_of_it = [queue[i] for i in range(waiting) if i not in starts]
        jumped = [queue[i] for i in starts if i > waiting]
        for count in range(len(running) + 1):
            for ended in itertools.combinations(running, count):
                room = sum(ended, spare - sum((queue[i] for i in starts if i < waiting), Resources()))
                room = room - sum(ahead_of_it, Resources())
                if _fits(queue[waiting], room):
                    assert _fits(queue[waiting], room - sum(jumped, Resources()))


def _fits(request: Resources, room: Resources) -> bool:
    """In each dimension that it uses."""
    return all(
        wanted == 0 or wanted <= has
        for wanted, has in ((request.gpus, room.gpus), (request.cpus, room.cpus), (request.memory, room.memory))
    )


@given(queue=st.lists(amounts, max_size=6), spare=amounts)
def test_what_starts_together_fits_together(queue, spare):
    started = sum((queue[i] for i in claims.startable(queue, spare)), Resources())
    assert started.fits(spare)


def test_the_first_free_gpus_are_picked():
    assert claims.pick(2, GPUS, {"example.com/gpu=0", "example.com/gpu=2"}) == (
        "example.com/gpu=1",
        "example.com/gpu=3",
    )
    with pytest.raises(ValueError, match="2 GPUs asked for, 1 free"):
        claims.pick(2, GPUS[:1], ())


def test_free_is_what_nobody_claimed():
    held = [Claim(("a", "b"), 2.0, 100), Claim((), 1.0, 0)]
    assert claims.free(Resources(4, 8.0, 1000), held) == Resources(2, 5.0, 900)


def test_the_reason_names_what_is_missing():
    queue = [Resources(gpus=2, memory=2 << 30), Resources(gpus=1)]
    assert claims.reason(queue, 0, Resources(1, 4.0, 1 << 30)) == (
        "needs 2 GPUs, 1 free; needs 2.0 GiB of memory, 1.0 GiB free"
    )
    assert claims.reason(queue, 1, Resources(1, 4.0, 1 << 30)) == "1 session ahead in the queue would be delayed"
