"""Jobs are claimed once, and repeated under the same number if their process ends."""

import time

import optuna
import pytest

from lightning_gr.tune import study as module
from lightning_gr.tune.space import TuneError
from lightning_gr.tune.study import Owner, Queue, open_storage

BOUNDS = {"rho": (0.01, 1.0)}


@pytest.fixture
def storage(tmp_path):
    return open_storage(None, tmp_path)


@pytest.fixture
def new_owner(tmp_path):
    """A function that creates owners, which are closed after the test."""
    made = []

    def make(folder=None):
        made.append(Owner((folder or tmp_path) / "processes"))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def owner(new_owner):
    return new_owner()


@pytest.fixture(autouse=True)
def _closed_owners_are_dead(monkeypatch):
    """Treat closed owners as dead, since within one process no lock reveals them."""
    closed, close = set(), Owner.close

    def note(self):
        closed.add(self.name)
        close(self)

    monkeypatch.setattr(Owner, "close", note)
    monkeypatch.setattr(Owner, "is_dead", lambda self, name: name in closed)


def run(queue, limit, value=lambda job, chosen: chosen["rho"], first=()):
    """Work on all jobs; return the constants by index."""
    found = {}
    while (job := queue.claim(limit)) is not None:
        chosen = queue.suggest(job, BOUNDS, first)
        found[job.index] = chosen["rho"]
        job.finish(value(job, chosen), constants=chosen)
    return found


def test_as_many_jobs_as_requested(storage, owner):
    queue = Queue(storage, "a", owner)
    assert list(run(queue, 3)) == [0, 1, 2]
    assert list(run(queue, 5)) == [3, 4]
    assert list(queue.done()) == [0, 1, 2, 3, 4]


def test_the_first_constants_are_given_and_all_lie_within_the_bounds(storage, owner):
    found = run(Queue(storage, "a", owner), 6, first=[{"rho": 0.5}, {"rho": 0.05}])
    assert (found[0], found[1]) == (0.5, 0.05)
    assert all(0.01 <= value <= 1.0 for value in found.values())


@pytest.mark.parametrize("stop_at", [0, 2, 4])
def test_an_interrupted_search_chooses_the_same_constants(tmp_path, new_owner, stop_at):
    def constants(folder, interrupted):
        folder.mkdir()
        first, second = new_owner(folder), new_owner(folder)
        queue = Queue(open_storage(None, folder), "a", first)
        found = run(queue, stop_at)
        if interrupted:
            lost = queue.claim(6)  # without a result
            queue.suggest(lost, BOUNDS, ())
            first.close()
            queue = Queue(open_storage(None, folder), "a", second)
        return {**found, **run(queue, 6)}

    assert constants(tmp_path / "whole", False) == constants(tmp_path / "stopped", True)


def test_a_repeated_job_keeps_its_constants_and_its_number(storage, owner, new_owner):
    other = new_owner()
    lost = Queue(storage, "a", other).claim(4)
    chosen = lost.queue.suggest(lost, BOUNDS, ())
    other.close()
    again = Queue(storage, "a", owner).claim(4)
    assert again.index == lost.index
    assert again.queue.suggest(again, BOUNDS, [{"rho": 0.7}]) == chosen


def test_a_running_process_keeps_its_job(storage, owner, new_owner):
    other = new_owner()
    assert Queue(storage, "a", other).claim(1) is not None
    queue = Queue(storage, "a", owner)
    assert queue.claim(1) is None
    assert queue.done() == {}


def test_without_an_accessible_lock_the_time_stamp_decides(storage, owner, new_owner, monkeypatch):
    other = new_owner()
    Queue(storage, "a", other).claim(1)
    monkeypatch.setattr(Owner, "is_dead", lambda self, name: None)
    queue = Queue(storage, "a", owner)
    assert queue.claim(1) is None
    later = time.time() + module.GRACE + 1
    monkeypatch.setattr(module.time, "time", lambda: later)
    assert queue.claim(1).index == 0


def test_a_job_is_marked_as_alive_while_it_is_worked_on(storage, owner, monkeypatch):
    monkeypatch.setattr(module, "BEAT", 0.01)
    queue = Queue(storage, "a", owner)
    job = queue.claim(1)
    before = queue.trials()[0].user_attrs["alive"]
    with job.alive():
        time.sleep(0.2)
    assert queue.trials()[0].user_attrs["alive"] > before


def test_a_released_job_can_be_claimed_immediately(storage, owner):
    queue = Queue(storage, "a", owner)
    queue.claim(1).release()
    assert queue.claim(1).index == 0


def test_a_job_that_repeatedly_ends_its_process_counts_as_failed(storage, new_owner):
    for _ in range(module.MOST_ATTEMPTS):
        owner = new_owner()
        assert Queue(storage, "a", owner).claim(1) is not None
        owner.close()
    owner = new_owner()
    queue = Queue(storage, "a", owner)
    assert queue.claim(1) is None
    assert "ended without a result" in queue.done()[0].user_attrs["error"]


def test_failed_and_pruned_jobs_are_not_repeated(storage, owner):
    queue = Queue(storage, "a", owner)
    queue.claim(3).fail("ValueError: no")
    queue.claim(3).finish(None)
    queue.claim(3).finish(1.0)
    assert queue.claim(3) is None
    assert [trial.state.name for trial in queue.done().values()] == ["FAIL", "PRUNED", "COMPLETE"]


def test_a_result_is_dropped_if_the_job_was_taken_over(storage, owner, tmp_path):
    slept = Owner(tmp_path / "processes")
    late = Queue(storage, "a", slept).claim(1)
    slept.close()
    queue = Queue(storage, "a", owner)
    queue.claim(1).finish(2.0)
    late.finish(1.0)
    assert queue.done()[0].value == 2.0


@pytest.mark.parametrize(
    ("storage", "said"),
    [
        ("postgresql://user:secret@127.0.0.1:1/none", r"cannot open the storage postgresql://user:\*\*\*@"),
        ("nonsense://x", "cannot open the storage nonsense://x"),
        ("/no/such/folder/journal.log", "cannot open the storage /no/such"),
    ],
)
def test_a_storage_that_cannot_be_reached_is_one_line(storage, said, tmp_path):
    with pytest.raises(TuneError, match=said) as error:
        open_storage(storage, tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_a_database(tmp_path):
    (tmp_path / "study.db").write_text("nothing of the kind, and long enough to be looked at" * 10)
    with pytest.raises(TuneError, match="cannot open the storage"):
        open_storage(None, tmp_path)


def test_a_journal_file_as_storage(tmp_path, owner):
    queue = Queue(open_storage(str(tmp_path / "journal.log"), tmp_path), "a", owner)
    assert list(run(queue, 2)) == [0, 1]
    assert optuna.study.get_all_study_names(open_storage(str(tmp_path / "journal.log"), tmp_path)) == ["a"]


def test_a_second_constant_does_not_depend_on_whether_the_first_was_known(storage, owner):
    """Such as after an interruption between the two suggestions."""
    both, second = Queue(storage, "a", owner), {"gamma": (0.01, 1.0)}
    job = both.claim(3)
    chosen = both.suggest(job, {**BOUNDS, **second}, ())
    job.release()
    lost = Queue(storage, "b", owner)
    lost.name = both.name
    assert lost.suggest(lost.claim(3), second, ())["gamma"] == chosen["gamma"]
