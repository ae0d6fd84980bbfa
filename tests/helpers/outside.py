"""Records what happens in both passes, in objects that are not restored after the second one."""

import types

# the package searches what a training step can reach for state to restore, but does not enter module objects


class Record(types.ModuleType):
    """A list that keeps what is added to it in a second pass."""

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
    """Counts its calls in all passes from 0, like ``next`` on ``itertools.count()``."""

    def __init__(self):
        super().__init__("counter")
        self.value = -1

    def __call__(self):
        self.value += 1
        return self.value
