"""The contract for iterators, files and other state that cannot be rewound: a single warning names it."""

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


def closed_later(thing):
    """Register ``thing`` to be closed after the test; otherwise some later test would get a warning about it."""
    OPEN.append(thing)
    return thing


@pytest.fixture(autouse=True)
def _close_everything():
    yield
    while OPEN:
        OPEN.pop().close()


def warned(kind, form, method=HUGE):
    """Train, and return the run and the package's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = train(kind, form, method)
    lightning = ("many workers", "smaller than the logging interval", "LeafSpec", "val_dataloader", "`srun` command")
    texts = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    return found, [text for text in texts if not any(known in text for known in lightning)]


class Writes(Situation):
    """Writes a line to a file in each step."""

    attribute = "stream"

    def prepare(self):
        self.stream = closed_later((PLACE["path"] / "losses.txt").open("w"))

    def step(self, batch):
        self.stream.write("a line of some length\n")
        self.stream.flush()
        return self.mse(batch)


class WritesInLayer(Writes):
    """The file is in a deeper object, whose path the warning names."""

    attribute = "stream"

    class Log:
        def __init__(self):
            self.stream = closed_later((PLACE["path"] / "losses.txt").open("w"))

    def prepare(self):
        self.head = nn.Identity()
        self.head.log = self.Log()

    def step(self, batch):
        self.head.log.stream.write("a line of some length\n")
        self.head.log.stream.flush()
        return self.mse(batch)


class Generator(Situation):
    """A running generator, which each step advances by ``next``."""

    attribute = "noise"

    def prepare(self):
        self.noise = (value for value in range(10**6))

    def step(self, batch):
        return self.mse(batch) * (1 + next(self.noise) / 100)


class IteratorOfALoader(Situation):
    """A second loader, from which each step takes a batch, as is common for unlabelled data."""

    attribute = "unlabelled"

    def prepare(self):
        self.unlabelled = self.cycle()

    def cycle(self):
        while True:
            yield from range(7)

    def step(self, batch):
        return self.mse(batch) * (1 + next(self.unlabelled))


@over(Writes, WritesInLayer, Generator, IteratorOfALoader)
def test_one_warning_names_what_cannot_be_restored(kind, form, tmp_path):
    PLACE["path"] = tmp_path
    found, texts = warned(kind, form)
    ours = [text for text in texts if kind.attribute in text]
    if form == "functional":  # each call warns, but Python shows a warning from the same line once
        ours = sorted(set(ours))
    assert len(ours) == 1
    assert ours == sorted(set(texts)) if form == "functional" else ours == texts
    assert "in_second_pass" in ours[0]
    assert "\n" not in ours[0]
    if kind is WritesInLayer:
        assert "head" in ours[0]
    assert len(found.first) == len(found.second) == STEPS


class Guarded(Writes):
    """The documented solution: the step asks whether it is in a second pass."""

    def step(self, batch):
        if not in_second_pass():
            self.stream.write("a line of some length\n")
            self.stream.flush()
        return self.mse(batch)


class OnlyHeld(Situation):
    """Objects that exist but do not change: a file, a socket, a digest, generators, iterators, a connection."""

    def prepare(self):
        self.stream = closed_later((PLACE["path"] / "read.txt").open("w"))
        self.noise, self.count = (value for value in range(3)), itertools.count()
        self.files = {"one": iter([1, 2]), "two": zip([1], [2], strict=True)}
        self.socket, self.base = closed_later(socket.socket()), closed_later(sqlite3.connect(":memory:"))
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


# --- restored or warned about


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
        self.base = closed_later(sqlite3.connect(":memory:"))
        self.base.execute("create table losses (value real)")

    def step(self, batch):
        self.base.execute("insert into losses values (1.0)")
        return self.mse(batch)

    def state(self):
        return self.base.total_changes


class Counter(Situation):
    """``itertools.count``, whose state can be read."""

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
    """A queue whose items are in an extension."""

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
def test_restored_or_warned_about(kind, form):
    plain = train(kind, form).module.state()
    found, texts = warned(kind, form)
    if found.module.state() != plain:
        assert len(set(texts)) == 1
        assert kind.attribute in texts[0]
    else:
        assert texts == []


def test_warns_once_per_run():
    """Even in a longer run with more learning steps."""

    class Long(Generator):
        steps = 40

    for form in ("automatic", "accumulation", "mixin"):
        _, texts = warned(Long, form)
        assert len(texts) == 1


@pytest.mark.parametrize("form", FORMS)
def test_everything_else_is_restored(form, tmp_path):
    """State that cannot be restored must not prevent other state from being restored."""

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
