"""What a search from a module reaches, and what it does not enter."""

import collections
import contextvars
import ctypes
import functools
import gc
import hashlib
import io
import logging
import multiprocessing
import queue
import random
import threading
import types
from collections import UserDict
from dataclasses import dataclass, field

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_gr.replay.contents import SettablePlace
from lightning_gr.replay.machinery import WriterPlace
from lightning_gr.replay.opaque import OpaquePlace
from lightning_gr.replay.places import MOST_ENTRIES, ClassPlace, EntryPlace
from lightning_gr.replay.walk import Walk, walk


def owners(**roots):
    return [place.owner for place in walk(roots)]


def is_found(target, **roots):
    return any(owner is target for owner in owners(**roots))


# --- what can be reached


@dataclass
class Data:
    inner: dict = field(default_factory=dict)


class Slots:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


class Object:
    def __init__(self, inner):
        self.inner = inner

    def method(self):
        return self.inner


class Function(torch.autograd.Function):
    pass


def captured(target):
    return lambda: target


def by_default(target):
    def function(x=target):
        return x

    return function


def by_keyword(target):
    def function(*, x=target):
        return x

    return function


def cached(maxsize):
    def make(target):
        function = functools.lru_cache(maxsize)(Object)
        function(Object(target))
        return function

    return make


def attribute_of_a_cache(target):
    function = functools.cache(abs)
    function.note = target
    return function


def thread_local(target):
    local = threading.local()
    local.inner = target
    return local


def in_body(wrap):
    """An object whose class has a function with the target in its closure."""
    return lambda target: type("Own", (), {"found": wrap(lambda self: target)})()


def noted(value):
    def make(target):
        value.note = target
        return value

    return make


def structured(target):
    array = np.zeros(1, dtype=[("number", "f8"), ("object", object)])
    array["object"][0] = target
    return array


def hook_on_a_weight(target):
    weight = nn.Parameter(torch.ones(1))
    weight.register_hook(captured(target))
    return weight


class Private:
    __slots__ = ("__inner",)

    def __init__(self, inner):
        self.__inner = inner


class Derived(Slots):
    """Has a dictionary in addition to the slots of its base."""


def with_attribute(target):
    def function():
        return None

    function.note = target
    return function


def with_hook(target):
    layer = nn.Linear(1, 1)
    layer.register_forward_hook(captured(target))
    return layer


WAYS = {
    "list": lambda t: [t], "tuple": lambda t: (1, (t,)), "dict": lambda t: {"a": {"b": t}},
    "UserDict": lambda t: UserDict(a=t),
    "dataclass": lambda t: Data({"x": t}), "slots": Slots, "object": Object, "method": lambda t: Object(t).method,
    "closure": captured, "closure of a closure": lambda t: captured(captured(t)), "default": by_default,
    "attribute of a function": with_attribute, "partial": lambda t: functools.partial(print, t, x=1),
    "keyword of a partial": lambda t: functools.partial(print, x=t), "hook": with_hook,
    "class attribute": lambda t: type("Own", (), {"shared": t})(),
    "array of objects": lambda t: np.array([t, None], dtype=object),
    "namespace": lambda t: types.SimpleNamespace(x=t), "list subclass": lambda t: type("L", (list,), {})([t]),
    "keyword default": by_keyword, "function of a partial": lambda t: functools.partial(captured(t)),
    "bounded cache": cached(8), "unbounded cache": cached(None), "attribute of a cache": attribute_of_a_cache,
    "thread-local": thread_local, "method in a body": in_body(lambda f: f), "property": in_body(property),
    "setter": in_body(lambda f: property(None, f)), "deleter": in_body(lambda f: property(None, None, f)),
    "static method": in_body(staticmethod), "class method": in_body(classmethod),
    "cached property": in_body(functools.cached_property), "cache in a body": in_body(functools.cache),
    "function of a method": lambda t: types.MethodType(lambda self: t, Object(1)),
    "attribute of a base class": lambda t: type("Own", (type("Base", (), {"shared": t}),), {})(),
    "class": lambda t: type("Own", (), {"shared": t}),
    "structured array": structured, "deque": lambda t: collections.deque([t]), "set": lambda t: {Object(t)},
    "frozenset": lambda t: frozenset([Object(t)]), "key": lambda t: {Object(t): 1},
    "values of a dictionary": lambda t: {"a": t}.values(), "keys of a dictionary": lambda t: {Object(t): 1}.keys(),
    "items of a dictionary": lambda t: {"a": t}.items(), "proxy": lambda t: types.MappingProxyType({"a": t}),
    "method of a list": lambda t: [t].append, "wrapper of a method": lambda t: [t].__len__,
    "attribute of a tensor": lambda t: noted(torch.zeros(1))(t), "hook on a weight": hook_on_a_weight,
    "attribute of a dictionary": lambda t: noted(type("D", (dict,), {})())(t),
    "attribute of a list": lambda t: noted(type("L", (list,), {})())(t),
    "attribute of a set": lambda t: noted(type("S", (set,), {})())(t),
    "attribute of an array": lambda t: noted(type("A", (np.ndarray,), {})(1))(t),
    "private slot": Private, "slot of a base": Derived, "attribute beside slots": lambda t: noted(Derived(1))(t),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_is_reached_by(way):
    target = {"a": 1}
    assert is_found(target, self=WAYS[way](target))
    module = nn.Module()
    module.x = WAYS[way](target)
    assert is_found(target, self=module)
    module.y = WAYS[way](target)
    found = walk({"self": module})
    assert all(isinstance(place.path, str) for place in found)
    assert len({(type(place), id(place.owner)) for place in found}) == len(found)  # each once


@pytest.mark.parametrize(
    "wrap",
    [
        logging.getLogger, type("DataLoader", (Object,), {}),
        type("MyTrainer", (type("Trainer", (Object,), {}),), {}),
        lambda t: dict.fromkeys(range(MOST_ENTRIES + 1), t), lambda t: [t] * (MOST_ENTRIES + 1),
        lambda t: (t,) * (MOST_ENTRIES + 1), lambda t: {Object(t), *range(MOST_ENTRIES)},
        lambda t: np.array([t] * (MOST_ENTRIES + 1)),
    ],
)  # fmt: skip
def test_is_not_entered(wrap):
    target = {"a": 1}
    value = wrap("x") if wrap is logging.getLogger else wrap(target)
    assert not is_found(target, self={"value": value})


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: dict.fromkeys(range(MOST_ENTRIES), t), lambda t: [t] * MOST_ENTRIES, lambda t: (t,) * MOST_ENTRIES,
        lambda t: {Object(t), *range(MOST_ENTRIES - 1)}, lambda t: np.array([t] * MOST_ENTRIES),
    ],
)  # fmt: skip
def test_a_container_of_the_largest_size_is_entered(wrap):
    target = {"a": 1}
    assert is_found(target, self={"value": wrap(target)})


LARGE = [
    dict.fromkeys(range(MOST_ENTRIES + 1)), list(range(MOST_ENTRIES + 1)), set(range(MOST_ENTRIES + 1)),
    np.arange(2.0**16), torch.zeros(2**16), bytearray(2**16), (ctypes.c_int * 9)(), ctypes.c_int(), random.Random(0),
    torch.Generator(), io.BytesIO(), contextvars.ContextVar("own"),
]  # fmt: skip


@pytest.mark.parametrize("value", LARGE, ids=lambda value: type(value).__name__)
def test_what_has_content_is_found_however_large_it_is(value):
    assert [place.path for place in walk({"self": {"value": value}}) if place.owner is value] == ["self['value']"]


def test_what_cannot_be_written_to_is_not_found():
    constant = np.zeros(3)
    constant.flags.writeable = False
    lazy = nn.LazyLinear(2)
    for value in (constant, lazy.weight, (torch.ones(1, requires_grad=True) * 2)):
        assert not is_found(value, self={"value": value})


def test_the_memory_behind_a_view_of_bytes_is_found():
    data = bytearray(3)
    assert is_found(data, self={"view": memoryview(data)})


def test_the_body_of_a_class_is_not_taken_for_a_dictionary():
    assert not any(isinstance(place, EntryPlace) and "shared" in place.owner for place in walk({"self": [vars(Plain)]}))


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: (ctypes.c_double * 2)(), SettablePlace),
        (lambda: (ctypes.POINTER(ctypes.c_int) * 2)(), OpaquePlace),  # what they point to is elsewhere
        (lambda: (ctypes.py_object * 2)(), OpaquePlace),
    ],
)
def test_arrays_of_c_are_put_back_if_they_are_of_numbers(make, kind):
    value = make()
    (place,) = (place for place in walk({"self": [value]}) if place.owner is value)
    assert type(place) is kind
    assert place.path == "self[0]"


def test_shared_memory_is_found_behind_its_lock():
    number = multiprocessing.Value("i", 3)
    assert is_found(number.get_obj(), self={"number": number})


@pytest.mark.parametrize("make", [lambda t: (t,), lambda t: t.add, lambda t: functools.partial(print, t), by_default])
def test_a_set_to_which_something_refers_for_good_cannot_be_replaced(make):
    held, free = {1}, {1}
    places = {id(place.owner): place for place in walk({"self": {"holder": make(held), "free": free, "held": held}})}
    assert not places[id(held)].can_be_replaced
    assert places[id(free)].can_be_replaced


def test_of_a_bounded_cache_only_arguments_and_results_are_found():
    """What it keeps for itself would be spoilt by putting it back."""
    function = functools.lru_cache(2)(lambda argument: [argument])
    table = next(each for each in gc.get_referents(function) if type(each) is dict and each is not vars(function))
    assert not is_found(table, self={"f": function})
    results = [function(number) for number in range(3)]
    assert [is_found(result, self={"f": function}) for result in results] == [False, True, True]
    assert not is_found(table, self={"f": function})


def test_what_was_seen_is_not_entered_again():
    shared, own = [1], [2]
    first = Walk(frozenset(), ()).enter([("self", [shared])])
    again = Walk(frozenset(), (), first.seen).enter([("self", [shared, own])])
    assert not any(place.owner is shared for place in again.places)
    assert any(place.owner is own for place in again.places)


def test_results_of_a_graph_are_not_kept_alive():
    weight = torch.ones(2, requires_grad=True)
    result = weight * 2
    seen = Walk(frozenset(), ()).enter([("self", [weight, result])]).seen
    assert id(weight) in seen
    assert id(result) not in seen


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.note = nn.Linear(1, 1), [1]


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ((), {"_parameters", "_buffers", "_modules", "note"}),
        (("_parameters", "note"), {"_buffers", "_modules"}),
        (("*",), {"_modules"}),
    ],
)
def test_what_a_strategy_manages_is_left_alone_except_for_the_layers_within(names, parts):
    layer = Layer()
    found = Walk(frozenset(), (), managed={id(layer): frozenset(names)}).enter([("self", layer)])
    ids = {id(place.owner) for place in found.places}
    assert {name for name in ("_parameters", "_buffers", "_modules", "note") if id(vars(layer)[name]) in ids} == parts
    assert id(layer.inner.weight) in ids


def test_empty_tables_of_hooks_are_not_expected_to_change():
    layer = nn.Linear(1, 1)
    layer.register_forward_hook(print)
    quiet = {place.path: place.quiet for place in walk({"self": layer}) if isinstance(place, EntryPlace)}
    assert quiet["self._backward_hooks"]
    assert quiet["self._forward_hooks_with_kwargs"]
    assert quiet["self._forward_hooks_always_called"]
    assert not quiet["self._forward_hooks"]
    assert not quiet["self"]


def test_module_objects_and_closed_objects_are_not_entered():
    target, record = [1], types.ModuleType("record")
    record.items = target
    assert not is_found(target, self=[record])
    assert not any(place.owner is target for place in walk({"self": [target]}, closed=[target]))


def test_no_property_runs_and_reference_cycles_end():
    class Loud:
        def __init__(self):
            self.itself = self

        @property
        def bad(self):
            raise AssertionError("a property was read")

        def __getattr__(self, name):
            raise AssertionError("an attribute was asked for")

    assert len(owners(self=Loud())) > 0


def test_hidden_attributes_of_a_lightning_module():
    module = pl.LightningModule()
    module.mine, module.theirs = {"a": 1}, {"b": 1}
    found = [place.owner for place in walk({"self": module}, frozenset({"theirs"}))]
    assert any(owner is module.mine for owner in found)
    assert not any(owner is module.theirs for owner in found)


def test_an_attribute_of_that_name_of_another_module_is_not_hidden():
    module = nn.Module()
    module.theirs = {"b": 1}
    assert any(place.owner is module.theirs for place in walk({"self": module}, frozenset({"theirs"})))


def test_a_place_may_be_given_instead_of_an_object():
    table = {"a": [1]}
    given = [("x", EntryPlace(table, "x")), ("y", EntryPlace(table, "y")), ("z", table)]
    found = Walk(frozenset(), ()).enter(given)
    assert [place.path for place in found.places if place.owner is table] == ["x"]
    assert any(place.owner is table["a"] for place in found.places)
    assert found.seen[id(table)] is table


class SummaryWriter:
    """By its name a client that writes files."""

    def __init__(self):
        self.items = [1]


def test_a_writer_is_named_and_not_entered():
    writer = SummaryWriter()
    (place,) = walk({"self": {"writer": writer}})[1:]
    assert type(place) is WriterPlace
    assert place.owner is writer
    assert place.path == "self['writer']"


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: iter([1]), True), (lambda: (x for x in [1]), True), (hashlib.sha256, True), (queue.SimpleQueue, True),
        (lambda: iter(DataLoader([1])), True), (threading.Lock, False),
        (lambda: Object(1), False),
    ],
)  # fmt: skip
def test_what_cannot_be_rewound_is_named_unless_it_belongs_to_the_machinery(make, found):
    value = make()
    places = [place for place in walk({"self": {"x": value}}) if isinstance(place, OpaquePlace)]
    assert [(place.owner, place.path) for place in places] == ([(value, "self['x']")] if found else [])


def test_the_bodies_of_classes_of_libraries_are_not_found():
    class Own(nn.Linear):
        shared = 1

    classes = [place.owner for place in walk({"self": [Own(1, 1), nn.Linear(1, 1), nn.Linear, collections.OrderedDict]})
               if isinstance(place, ClassPlace)]  # fmt: skip
    assert classes == [Own]


class Plain:
    shared = 1


def test_paths_read_like_code():
    net = nn.Sequential(nn.Linear(1, 1))
    net[0].weight.register_hook(lambda grad, inner=[]: inner)
    net.extra = {"k": [Plain()], "pair": (1, [2]), "late": functools.partial(print, [3], end=[4])}
    net.lazy, net.derived = nn.LazyLinear(1), Derived(1)
    net.slots, net.call, net.object = Slots([5]), captured([6]), Object([7])
    paths = [place.path for place in walk({"self": net})]
    expected = {
        "self.0.weight", "self.extra['k'][0]", "self.extra['k'][0].Plain", "self.extra['pair'][1]", "self.slots.inner",
        "self.extra['late'][0]", "self.extra['late']['end']", "target", "self.object.inner", "self.0.weight.hook",
        "self.lazy", "self.derived.Derived", "self.derived.Derived.Slots",
    }  # fmt: skip
    assert expected <= set(paths)
