"""Which optimizer steps are regularized, and how strongly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_gr.core.schedule import Schedule

few = st.integers(0, 20)
schedules = st.builds(Schedule, few, st.integers(1, 7), few, st.booleans())


@given(schedule=schedules)
def test_due_at_every_interval_from_the_start_step(schedule):
    due = [step for step in range(100) if schedule.due(step)]
    assert due == list(range(schedule.start_step, 100, schedule.interval))


@given(schedule=schedules, step=st.integers(0, 100))
def test_the_strength_grows_linearly_and_then_stays(schedule, step):
    full = schedule.interval if schedule.lazy else 1.0
    strengths = [schedule.strength(s) for s in range(step + 50)]
    assert strengths[-1] == full if schedule.warmup_steps < step + 50 - schedule.start_step else strengths[-1] <= full
    assert strengths == sorted(strengths)
    if schedule.warmup_steps:
        assert strengths[: schedule.start_step + 1] == [0.0] * (schedule.start_step + 1)
        assert schedule.strength(schedule.start_step + schedule.warmup_steps) == full
        half = schedule.start_step + schedule.warmup_steps / 2
        assert schedule.strength(half) == pytest.approx(full / 2)
    else:
        assert set(strengths) == {full}


@pytest.mark.parametrize(
    ("schedule", "text"),
    [
        (Schedule(), "every step"),
        (Schedule(interval=3), "every 3 steps"),
        (Schedule(1000, 3, 2000), "every 3 steps from step 1,000, growing over 2,000 steps"),
        (Schedule(interval=2, lazy=True), "every 2 steps, times 2"),
        (Schedule(interval=3, lazy=True), "every 3 steps, times 3"),
        (Schedule(lazy=True), "every step"),
    ],
)
def test_in_words(schedule, text):
    assert str(schedule) == text
