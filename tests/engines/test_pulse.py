"""Signs of life between hosts."""

import pytest
from torch.distributed import HashStore

from weft.engines import pulse
from weft.engines.pulse import Pulse


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is moved."""
    now = [100.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])
    return now


def test_a_host_that_falls_silent_is_lost_after_the_patience_and_no_sooner(clock):
    store = HashStore()
    first, second = Pulse(store, 0, 2, patience=30), Pulse(store, 1, 2, patience=30)
    for _ in range(5):
        clock[0] += 10
        assert second.lost() == [] and first.lost() == []
    clock[0] += 29
    assert first.lost() == []
    clock[0] += 2
    assert first.lost() == [1]


def test_a_host_that_is_done_may_be_silent(clock):
    store = HashStore()
    first, second = Pulse(store, 0, 2, patience=30), Pulse(store, 1, 2, patience=30)
    assert second.lost(done=True) == [] and not second.others_done()
    clock[0] += 1000
    assert first.lost() == [] and first.others_done()


def test_a_host_that_never_gave_a_sign_is_lost_too_and_one_alone_never(clock):
    waiting, alone = Pulse(HashStore(), 0, 3, patience=5), Pulse(HashStore(), 0, 1, patience=5)
    clock[0] += 6
    assert waiting.lost() == [1, 2] and alone.lost() == []
