"""The contract for iterators, files and other state that cannot be rewound: one warning names it."""

import ctypes
import hashlib
import itertools
import queue
import socket
import sqlite3
import warnings

import pytest
from contract import FORMS, STEPS, Situation, over, same, train
from oracle import HUGE, sam
from torch import nn

from lightning_gr import in_second_pass

PLACE = {}
OPEN = []


def opened(thing):
    """Something that the test closes at its end: what is left open is reported in the test in which it is collected."""
    OPEN.append(thing)
    return thing


@pytest.fixture(autouse=True)
def _all_is_closed():
    yield
    while OPEN:
        OPEN.pop().close()


def warned(kind, form, method=HUGE):
    """What the package has to say about a training."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(kind, form, method)
    lightning = ("many workers", "smaller than the logging interval", "LeafSpec", "val_dataloader", "`srun` command")
    texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return found, [text for text in texts if not any(known in text for known in lightning)]


class Writes(Situation):
    """A line of a file per step."""

    attribute = "stream"

    def prepare(self):
        self.stream = opened((PLACE["path"] / "losses.txt").open("w"))

    def step(self, batch):
        self.stream.write("a line of some length\n")
        self.stream.flush()
        return self.mse(batch)


class WritesInLayer(Writes):
    """Deeper: the warning names the path."""

    attribute = "stream"

    class Log:
        def __init__(self):
            self.stream = opened((PLACE["path"] / "losses.txt").open("w"))

    def prepare(self):
        self.head = nn.Identity()
        self.head.log = self.Log()

    def step(self, batch):
        self.head.log.stream.write("a line of some length\n")
        self.head.log.stream.flush()
        return self.mse(batch)


class Generator(Situation):
    """A running generator, advanced by ``next``."""

    attribute = "noise"

    def prepare(self):
        self.noise = (value for value in range(10**6))

    def step(self, batch):
        return self.mse(batch) * (1 + next(self.noise) / 100)


class IteratorOfALoader(Situation):
    """A second loader, from which each step takes a batch: a common way to mix in unlabelled data."""

    attribute = "unlabelled"

    def prepare(self):
        self.unlabelled = self.cycle()

    def cycle(self):
        while True:
            yield from range(7)

    def step(self, batch):
        return self.mse(batch) * (1 + next(self.unlabelled))


@over(Writes, WritesInLayer, Generator, IteratorOfALoader)
def test_one_warning_names_what_cannot_be_put_back(kind, form, tmp_path):
    PLACE["path"] = tmp_path
    found, texts = warned(kind, form)
    ours = [text for text in texts if kind.attribute in text]
    if form == "functional":  # each call is separate, and Python shows a warning from the same line once
        ours = sorted(set(ours))
    assert len(ours) == 1
    assert ours == sorted(set(texts)) if form == "functional" else ours == texts
    assert "in_second_pass" in ours[0]
    assert "\n" not in ours[0]
    if kind is WritesInLayer:
        assert "head" in ours[0]
    assert len(found.first) == len(found.second) == STEPS


class Guarded(Writes):
    """The way out: the step asks."""

    def step(self, batch):
        if not in_second_pass():
            self.stream.write("a line of some length\n")
            self.stream.flush()
        return self.mse(batch)


class OnlyHeld(Situation):
    """What is there and not written: a file, a socket, a lock, a generator, an iterator, a connection."""

    def prepare(self):
        self.stream = opened((PLACE["path"] / "read.txt").open("w"))
        self.noise, self.count = (value for value in range(3)), itertools.count()
        self.files = {"one": iter([1, 2]), "two": zip([1], [2], strict=True)}
        self.socket, self.base = opened(socket.socket()), opened(sqlite3.connect(":memory:"))
        self.digest = hashlib.sha256()

    def step(self, batch):
        return self.mse(batch)


@over(Guarded, OnlyHeld)
def test_no_warning_without_need(kind, form, tmp_path):
    PLACE["path"] = tmp_path
    found, texts = warned(kind, form)
    assert texts == []
    if kind is Guarded:
        found.module.stream.close()
        assert len((tmp_path / "losses.txt").read_text().splitlines()) == STEPS
    else:
        assert list(found.module.noise) == [0, 1, 2]
        assert next(found.module.count) == 0
        assert list(found.module.files["one"]) == [1, 2]


# --- put back, or named


class Digest(Situation):
    """An object of a C extension that can be neither pickled nor deep-copied."""

    attribute = "digest"

    def prepare(self):
        self.digest = hashlib.sha256()

    def step(self, batch):
        self.digest.update(b"step")
        return self.mse(batch)

    def state(self):
        return self.digest.hexdigest()


class Database(Situation):
    attribute = "base"

    def prepare(self):
        self.base = opened(sqlite3.connect(":memory:"))
        self.base.execute("create table losses (value real)")

    def step(self, batch):
        self.base.execute("insert into losses values (1.0)")
        return self.mse(batch)

    def state(self):
        return self.base.total_changes


class Counter(Situation):
    """``itertools.count``, of which the state can be read."""

    attribute = "counter"

    def prepare(self):
        self.counter = itertools.count()

    def step(self, batch):
        return self.mse(batch) * (1 + next(self.counter))

    def state(self):
        return repr(self.counter)


class DataOfC(Counter):
    def prepare(self):
        self.counter = ctypes.c_int(0)

    def step(self, batch):
        self.counter.value += 1
        return self.mse(batch)

    def state(self):
        return self.counter.value


class Queue(Counter):
    """Its items are in an extension."""

    def prepare(self):
        self.counter = queue.SimpleQueue()

    def step(self, batch):
        self.counter.put(1)
        return self.mse(batch)

    def state(self):
        return self.counter.qsize()


class ListIterator(Counter):
    attribute = "order"

    def prepare(self):
        self.order = iter(list(range(100)))

    def step(self, batch):
        return self.mse(batch) * (1 + next(self.order))

    def state(self):
        return self.order.__length_hint__()


@over(Digest, Database, Counter, DataOfC, Queue, ListIterator)
def test_put_back_or_named(kind, form):
    plain = train(kind, form).module.state()
    found, texts = warned(kind, form)
    if found.module.state() != plain:
        assert len(set(texts)) == 1
        assert kind.attribute in texts[0]
    else:
        assert texts == []


def test_a_warning_comes_once_in_all_of_a_run():
    """Also where it goes on for long, with many learning steps."""

    class Long(Generator):
        steps = 40

    for form in ("automatic", "accumulation", "mixin"):
        _, texts = warned(Long, form)
        assert len(texts) == 1


@pytest.mark.parametrize("form", FORMS)
def test_the_rest_is_put_back_beside_it(form, tmp_path):
    """Something that cannot be put back does not keep others from it."""

    class Beside(Writes):
        def prepare(self):
            super().prepare()
            self.calls, self.seen = 0, {"n": []}

        def step(self, batch):
            self.calls += 1
            self.seen["n"].append(self.calls)
            return super().step(batch)

    PLACE["path"] = tmp_path
    found, _ = warned(Beside, form, sam(0.5))
    assert found.module.calls == STEPS
    same("seen", {"n": found.module.seen["n"]}, {"n": list(range(1, STEPS + 1))})
    found.module.stream.close()
