"""Which task comes next, and which constants a search starts with."""

import math
from itertools import pairwise

import optuna
import pytest

from lightning_gr.tune import board as module
from lightning_gr.tune.board import Board, first_guesses
from lightning_gr.tune.plan import Plan
from lightning_gr.tune.ranges import Range
from lightning_gr.tune.space import METHODS, TuneError
from lightning_gr.tune.sweep import Sweep
from lightning_gr.tune.trial import Outcome

SWEEP = Sweep("rho", (0.1, 1.0), (0.0, 3.0), 2.0, 1.0)


def found(method):
    names = METHODS[method].constants
    return Range(method, SWEEP, dict.fromkeys(names, (0.01, 1.0)), dict.fromkeys(names, 0.5))


@pytest.fixture(autouse=True)
def _in_memory(monkeypatch):
    """Use a fast storage; `test_study` tests those on disk."""
    storage = optuna.storages.InMemoryStorage()
    monkeypatch.setattr(module, "open_storage", lambda *args: storage)


@pytest.fixture(autouse=True)
def _close_boards(monkeypatch):
    """Close all boards after the test to release their claims, since within one process no lock reveals dead owners."""
    made, original = [], Board.__init__

    def note(self, *args):
        made.append(self)
        original(self, *args)

    monkeypatch.setattr(Board, "__init__", note)
    yield
    for board in made:
        if hasattr(board, "owner"):
            board.close()


def make_board(tmp_path, settings=None, **options):
    defaults = {"monitor": "val_acc", "methods": ["SAM", "flooding"], "trials": 2, "seeds": 2, "output": tmp_path}
    plan = Plan.checked(**{**defaults, **options})
    return Board(plan, settings or {"model": "A"})


def drain(board, value=lambda task: 0.5, limit=100):
    """Finish all tasks without training, and return them."""
    tasks = []
    while (task := board.next()) is not None and len(tasks) < limit:
        tasks.append(task)
        if task.stage == "range":
            board.finish_range(found(task.method))
        else:
            board.finish(Outcome([value(task)], 0.01 if task.method == "plain" else 0.02, 1.0, 10), task)
    return tasks


def test_stages_come_in_order_and_methods_take_turns(tmp_path):
    board = make_board(tmp_path)
    tasks = [(task.stage, task.method, task.seed) for task in drain(board)]
    assert tasks == [
        ("range", "SAM", 0), ("range", "flooding", 0),
        ("search", "SAM", 0), ("search", "flooding", 0), ("search", "SAM", 0), ("search", "flooding", 0),
        ("final", "plain", 1), ("final", "SAM", 1), ("final", "flooding", 1),
        ("final", "plain", 2), ("final", "SAM", 2), ("final", "flooding", 2),
    ]  # fmt: skip
    board.close()


def test_finished_tasks_are_not_repeated_and_more_can_be_added(tmp_path):
    drain(make_board(tmp_path))
    assert drain(make_board(tmp_path)) == []
    more = drain(make_board(tmp_path, trials=3, seeds=3))
    assert [task.stage for task in more].count("search") == 2
    assert [task.seed for task in more if task.stage == "final" and task.method == "plain"] == [3]


def test_the_final_trainings_use_the_best_constants(tmp_path):
    board = make_board(tmp_path, methods=["SAM"], trials=3)
    tasks = drain(board, lambda task: task.constants.get("rho", 0.0))
    searched = [task.constants["rho"] for task in tasks if task.stage == "search"]
    assert {task.constants["rho"] for task in tasks if task.stage == "final" and task.constants} == {max(searched)}
    result = board.result()
    assert [row.method for row in result.rows] == ["plain", "SAM"]
    assert result.rows[1].cost == 2.0
    assert result.rows[1].values == {1: max(searched), 2: max(searched)}


def test_lower_is_better_for_losses(tmp_path):
    plan = Plan.checked(monitor="val_loss", methods=["SAM"], trials=3, seeds=1, output=tmp_path)
    board = Board(plan, {})
    tasks = drain(board, lambda task: task.constants.get("rho", 0.0))
    searched = [task.constants["rho"] for task in tasks if task.stage == "search"]
    assert board.best(METHODS["SAM"]) == {"rho": min(searched)}


def test_diverged_and_failed_trials_are_kept_and_the_search_continues(tmp_path):
    board = make_board(tmp_path, methods=["SAM"], trials=3, seeds=1)
    board.next()
    board.finish_range(found("SAM"))
    board.finish(Outcome([math.nan]), board.next())
    board.finish(Outcome(error="ValueError: no"), board.next())
    board.finish(Outcome([0.7]), board.next())
    drain(board)
    states = [(t["state"], t.get("error")) for t in board.result().trials if t["stage"] == "search"]
    assert states == [("PRUNED", None), ("FAIL", "ValueError: no"), ("COMPLETE", None)]


def test_if_all_trials_fail_the_first_error_is_raised(tmp_path):
    board = make_board(tmp_path, methods=["SAM"], trials=2)
    board.next()
    board.finish_range(found("SAM"))
    for text in ("first", "second"):
        board.finish(Outcome(error=text), board.next())
    with pytest.raises(TuneError, match="no trial of any method finished: first"):
        board.next()


def test_a_method_whose_range_test_fails_is_left_out_with_its_error(tmp_path):
    board = make_board(tmp_path)
    board.next()
    board.fail("SAM does not fit")
    tasks = drain(board)
    assert {task.method for task in tasks} == {"flooding", "plain"}
    assert board.result().errors == {"SAM": "SAM does not fit"}


@pytest.mark.parametrize("change", [{"settings": {"model": "B"}}, {"monitor": "val_loss"}, {"seed": 1}])
def test_another_study_in_the_folder_is_refused_by_naming_the_difference(tmp_path, change):
    make_board(tmp_path).close()
    options = {"monitor": "val_acc", **change}
    settings = options.pop("settings", {"model": "A"})
    plan = Plan.checked(methods=["SAM"], output=tmp_path, **options)
    with pytest.raises(TuneError, match=r"holds another study: .* was .* and is .*: give another --output"):
        Board(plan, settings)


def test_the_search_ends_after_its_maximum_time(tmp_path):
    board = make_board(tmp_path, trials=1000, max_time="0.0001")
    for _ in range(2):
        board.next()
        board.finish_range(found("SAM"))
    with pytest.raises(TuneError, match="out of time"):
        board.next()


def test_poor_trials_are_pruned_after_a_third_of_the_training(tmp_path):
    board = make_board(tmp_path, methods=["SAM"], trials=6)
    board.next()
    board.finish_range(found("SAM"))
    for _ in range(5):
        task = board.next()
        assert not any([board.prune(0, 0.9, 0.2), board.prune(1, 0.9, 0.5)])
        board.finish(Outcome([0.9, 0.9]), task)
    board.next()
    assert not board.prune(0, 0.1, 0.2)
    assert board.prune(1, 0.1, 0.5)
    assert board.prune(2, math.nan, 0.0)


@pytest.mark.parametrize(("mode", "early", "late", "mine"), [("max", 0.94, 0.9, 0.92), ("min", 0.4, 0.8, 0.6)])
def test_a_trial_is_not_pruned_if_earlier_ones_get_worse_later(tmp_path, mode, early, late, mine):
    """With wrong labels, plain training leads at first."""
    board = make_board(tmp_path, methods=["SAM"], trials=7, monitor="metric", mode=mode)
    board.next()
    board.finish_range(found("SAM"))
    for _ in range(5):
        task = board.next()
        board.prune(0, early, 0.5)
        board.finish(Outcome([early, late]), task)
    task = board.next()
    assert not board.prune(0, mine, 0.5)
    board.finish(Outcome([mine, mine]), task)
    board.next()
    assert board.prune(0, 2 * late - mine, 0.5)


@pytest.mark.parametrize("method", ["SAM", "F-GR"])
def test_first_guesses_start_with_the_suggestion_and_cover_the_bounds(method):
    each = found(method)
    guesses = first_guesses(each)
    assert guesses[0] == each.suggestion
    for name, (low, high) in each.bounds.items():
        values = sorted(guess[name] for guess in guesses)
        assert low <= values[0]
        assert values[-1] <= high
        ratios = [b / a for a, b in pairwise(values)]
        assert max(ratios) < (high / low) ** 0.6
