"""Records what happens in both passes, out of reach of a training step, whose state is restored after the second."""

import types

# a module object is not entered by the look at what a training step can reach


class Record(types.ModuleType):
    """A list that a search from the module cannot reach."""

    def __init__(self, items=()):
        super().__init__("record")
        self.items = list(items)

    def append(self, item):
        self.items.append(item)

    def extend(self, items):
        self.items.extend(items)

    def clear(self):
        self.items.clear()

    def count(self, item):
        return self.items.count(item)

    def __len__(self):
        return len(self.items)

    def __iter__(self):
        return iter(self.items)

    def __getitem__(self, position):
        return self.items[position]

    def __eq__(self, other):
        return self.items == list(other)

    __hash__ = None


class Counter(types.ModuleType):
    """Counts its calls from 0, like ``next`` on ``itertools.count()``, out of reach of a search from the module."""

    def __init__(self):
        super().__init__("counter")
        self.value = -1

    def __call__(self):
        self.value += 1
        return self.value
