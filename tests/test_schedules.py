"""Schedules against methods.md 7.4, and durations."""

import pytest
from pydantic import TypeAdapter, ValidationError

from engine.schedules import Duration, Horizon, Schedule, due, to_steps, value


def horizon(epochs, steps_per_epoch):
    return Horizon(epochs * steps_per_epoch, steps_per_epoch, 1)


BURN = horizon(200, 626)


def test_balance():
    schedule = Schedule(shape="cosine", start=0.1, end=0.3)
    expected = {0: 0.1, 1: 0.129289321881345, 2: 0.2, 3: 0.270710678118655, 4: 0.3}
    for quarter, wanted in expected.items():
        assert abs(value(schedule, quarter * 31_300, BURN) - wanted) < 1e-14


def test_burn_learning_rate():
    schedule = Schedule(shape="cosine", start=3e-4, per="epoch", warmup="10ep", warmup_ratio=1e-4)
    expected = {
        0: 3.0e-08,
        1: 7.791853035e-08,
        625: 2.997908147e-05,
        626: 3.002514782e-05,
        3130: 1.497837769e-04,
        6259: 2.984558692e-04,
        6260: 2.981532511e-04,
        62_600: 1.5e-04,
        125_199: 1.850512775e-08,
    }
    for step, wanted in expected.items():
        assert abs(value(schedule, step, BURN) / wanted - 1) < 1e-9


def test_linear_decay_by_epoch():
    schedule = Schedule(shape="linear", start=3e-4, per="epoch")
    days = horizon(200, 5004)
    for epoch, wanted in {0: 3e-4, 100: 1.5e-4, 199: 1.5e-6}.items():
        assert abs(value(schedule, epoch * 5004 + 17, days) - wanted) < 1e-15


@pytest.mark.parametrize(("start", "quarter"), [(0.99, 0.991464466094), (0.996, 0.996585786438)])
def test_momentum(start, quarter):
    schedule = Schedule(shape="cosine", start=start, end=1)
    assert abs(value(schedule, 25, Horizon(100, 100, 1)) - quarter) < 1e-12
    assert value(schedule, 100, Horizon(100, 100, 1)) == 1


def test_steps():
    schedule = Schedule(shape="step", start=0.01, milestones=("60ep", "80ep"))
    h = horizon(100, 5005)
    for epoch, wanted in {0: 0.01, 59: 0.01, 60: 1e-3, 79: 1e-3, 80: 1e-4, 99: 1e-4}.items():
        assert abs(value(schedule, epoch * 5005, h) / wanted - 1) < 1e-12


def test_durations():
    h = Horizon.of("200ep", 1_281_167, 4096)
    assert h.total_steps == 62_557
    assert abs(h.epochs - 200) < 1e-3
    assert to_steps("10%", h) == 6256
    assert to_steps("7it", h) == 7
    assert to_steps("0it", h) == 0
    assert h.epoch(313) == 1 and h.epoch(312) == 0
    for wrong in ("10", "10 ep", "ep", "-1it", "1e3it", ""):
        with pytest.raises(ValidationError):
            TypeAdapter(Duration).validate_python(wrong)


def test_due_at_the_end_and_on_multiples():
    h = Horizon(10, 100, 10)
    assert [step for step in range(1, 11) if due(step, "4it", h)] == [4, 8, 10]


def test_number_is_a_constant():
    assert value(Schedule.model_validate(0.5), 7, BURN) == 0.5
