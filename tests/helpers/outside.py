"""Where tests note what happens in both passes: what a training step can reach is put back after the second one."""

import types

# a module object is not entered by the look at what a training step can reach


class Record(types.ModuleType):
    """A list, out of reach."""

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
    """Counts its calls from 0, like ``next`` of ``itertools.count()``, out of reach."""

    def __init__(self):
        super().__init__("counter")
        self.value = -1

    def __call__(self):
        self.value += 1
        return self.value
