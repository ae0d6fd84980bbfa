"""Rank 0 decides, and sends its decisions to the other ranks."""

import pytest
import torch.distributed as dist

from lightning_gr.tune import ranks
from lightning_gr.tune.ranks import is_rank_zero, shared
from lightning_gr.tune.space import TuneError


def test_a_single_process_asks_directly():
    assert is_rank_zero()
    assert shared(lambda: [1, 2]) == [1, 2]


@pytest.fixture
def _second_of_two(monkeypatch):
    """Emulate a group in which this process is rank 1, and rank 0 sends `sent`."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)


@pytest.mark.usefixtures("_second_of_two")
def test_other_ranks_do_not_ask(monkeypatch):
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", lambda box, src: box.__setitem__(0, "from rank 0"))
    assert shared(lambda: pytest.fail("only rank 0 may ask")) == "from rank 0"


@pytest.mark.usefixtures("_second_of_two")
def test_an_error_of_rank_0_is_raised_on_all_ranks(monkeypatch):
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", lambda box, src: box.__setitem__(1, "no storage"))
    with pytest.raises(TuneError, match="no storage"):
        shared(lambda: None)
    sent = []
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", lambda box, src: sent.append(list(box)))
    with pytest.raises(TuneError, match="division"):
        shared(lambda: 1 / 0)
    assert sent == [[None, "division by zero"]]
