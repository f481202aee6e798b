"""Numbers of a schedule that follow from others: accumulation from a global batch, steps from epochs."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.small import config_of
from weft.errors import ConfigError
from weft.run.checks import items_per_step, settled
from weft.run.config import RunConfig


def survey(draws: int | None) -> Any:
    return SimpleNamespace(epoch_draws=lambda batch_size: draws)


def config(plain: dict[str, Any], **schedule: Any) -> RunConfig:
    return config_of({**plain, "schedule": schedule, "data": {**plain["data"], "batch_size": 2}})


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 12), (2, 6), (4, 3), (12, 1)])
def test_a_global_batch_is_the_same_on_any_number_of_processes(plain, processes, accumulate) -> None:
    found = settled(config(plain, global_batch=24), survey(10), processes)
    assert found.schedule.accumulate == accumulate
    assert items_per_step(found, processes) == 24


def test_a_global_batch_that_the_processes_cannot_share_is_refused_with_its_neighbours(plain) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.global_batch: 20 items do not divide by 6.*Write 18 or 24"):
        settled(config(plain, global_batch=20), survey(10), 3)


def test_a_global_batch_below_one_micro_batch_each_names_the_smallest(plain) -> None:
    with pytest.raises(ConfigError, match=r"Write 16,"):
        settled(config(plain, global_batch=2), survey(10), 8)


@pytest.mark.parametrize(("epochs", "accumulate", "processes", "steps"), [(3, 1, 1, 30), (3, 2, 2, 8), (0.5, 1, 1, 5)])
def test_epochs_become_steps_of_so_many_draws(plain, epochs, accumulate, processes, steps) -> None:
    found = settled(config(plain, epochs=epochs, accumulate=accumulate), survey(10), processes)
    assert found.schedule.steps == steps


def test_a_warmup_longer_than_the_epochs_is_refused(plain) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.warmup: it is 40, but 3 epochs are only 30 steps"):
        settled(config(plain, epochs=3, warmup=40), survey(10), 1)


def test_streamed_data_of_unknown_length_has_no_epochs(plain) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.epochs: the length of streamed data is not known"):
        settled(config(plain, epochs=3), survey(None), 1)


@pytest.mark.parametrize("both", [{"epochs": 1, "steps": 5}, {"global_batch": 4, "accumulate": 2}])
def test_a_number_and_what_decides_it_are_not_both_taken(plain, both) -> None:
    with pytest.raises(ConfigError, match="decides schedule"):
        config(plain, **both)


def test_a_config_is_saved_without_what_follows_and_parses_to_itself(plain) -> None:
    made = config(plain, epochs=3, global_batch=8)
    saved = settled(made, survey(10), 2).resolved()
    assert not {"steps", "accumulate"} & set(saved["schedule"])
    assert config_of(saved) == made
