"""The contract for the search for state, which runs no code of the module, and for side effects of the import."""

import json
import subprocess
import sys
import textwrap
from functools import cached_property

import pytest
import torch
from contract import FORMS, LIGHTNING, Batches, Situation, as_dict, make_trainer, over, same, seed, train
from fingerprints import fingerprint
from oracle import HUGE
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryPrecision, BinaryRecall

from lightning_gr import SAM, Flooding, GradientNormMonitor, GradientRegularization, SharpnessMonitor

TOUCHED = []


class Properties(Situation):
    """Properties that have side effects, raise, or are computed once."""

    @property
    def counted(self):
        TOUCHED.append("counted")
        return torch.zeros(1)

    @property
    def broken(self):
        TOUCHED.append("broken")
        raise RuntimeError("not available before the data are")

    @cached_property
    def expensive(self):
        TOUCHED.append("expensive")
        return torch.zeros(10)

    def step(self, batch):
        return self.mse(batch)


class Lazy:
    """Creates any attribute on access, as a proxy or a mock does."""

    def __init__(self):
        self.made = {}

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        TOUCHED.append(name)
        made = self.__dict__.setdefault("made", {})
        return made.setdefault(name, Lazy())


class Odd:
    """Records when it is compared, iterated, printed or converted, or its length is taken."""

    def __eq__(self, other):
        TOUCHED.append("eq")
        return True

    __hash__ = None

    def __len__(self):
        TOUCHED.append("len")
        return 3

    def __bool__(self):
        TOUCHED.append("bool")
        return True

    def __iter__(self):
        TOUCHED.append("iter")
        return iter([])

    def __repr__(self):
        TOUCHED.append("repr")
        return "odd"


class Proxies(Properties):
    """Such objects in attributes, in a list and in a torch.nn layer."""

    def prepare(self):
        self.lazy, self.odd = Lazy(), [Odd()]
        self.layer = nn.Identity()
        self.layer.odd = Odd()


class Layer(nn.Module):
    """A layer that records accesses to missing attributes."""

    def __getattr__(self, name):
        if name not in ("weight", "_forward_hooks"):
            TOUCHED.append(name)
        return super().__getattr__(name)

    @property
    def metric_state(self):
        TOUCHED.append("metric_state")
        return {}


class Layers(Properties):
    def prepare(self):
        self.layer = Layer()

    def on_train_start(self):
        # Lightning itself accesses some attributes
        TOUCHED.clear()


@over(Properties, Proxies, Layers)
def test_no_code_of_the_module_runs(kind, form):
    seen = []
    for method in (None, HUGE):
        TOUCHED.clear()
        train(kind, form, method)
        seen.append(sorted(set(TOUCHED)))
    # not empty, since the fingerprint at the end accesses some attributes
    assert seen[1] == seen[0]
    assert not {"counted", "broken", "expensive", "metric_state"} & set(seen[1])


@pytest.mark.parametrize(
    "callback",
    [
        GradientRegularization(gamma=0.0),
        SAM(start_step=100),
        SAM(0.0, metrics="all"),
        Flooding(0.0),
        GradientNormMonitor(),
        SharpnessMonitor(samples=2, max_iterations=2),
    ],
)
def test_compute_groups_stay_shared(callback):
    """``hasattr`` on a property of MetricCollection would unshare them and change the values of metrics."""
    values = []
    for callbacks in ([], [callback]):
        seed()
        module = Recalls()
        seed()
        make_trainer(*callbacks, max_epochs=2).fit(module, Batches(module.make_batches()))
        values.append((module.found, fingerprint(module.metrics)))
    assert values[1][0] == values[0][0]
    same("metrics", values[1][1], values[0][1])
    assert len(values[0][0]) == 2


class Recalls(Situation):
    forms = LIGHTNING

    def prepare(self):
        self.metrics = MetricCollection([BinaryPrecision(), BinaryRecall()])
        self.found = []

    def step(self, batch):
        self.metrics.update(self.net(batch[0])[:, 0].detach().float().sigmoid(), (batch[1][:, 0] > 0).long())
        return self.mse(batch)

    def on_train_epoch_end(self):
        self.found.append({name: float(value) for name, value in self.metrics.compute().items()})
        self.metrics.reset()


@over(Recalls)
def test_compute_groups_with_a_second_pass(kind, form):
    plain, found = train(kind, form), train(kind, form, HUGE)
    assert found.module.found == plain.module.found
    same("what is left", found.state, plain.state)


@pytest.mark.parametrize("form", FORMS)
def test_version_counters_of_tensors_that_are_only_read_stay(form):
    """Tensors that are only read must not be written to, so that graphs that use them stay valid."""

    class Reads(Situation):
        def prepare(self):
            self.register_buffer("table", torch.ones(3).double())
            self.prior, self.frozen = torch.ones(3).double(), nn.Parameter(torch.ones(3).double(), False)

        def step(self, batch):
            return self.mse((batch[0] * self.table * self.prior * self.frozen, batch[1]))

    module = train(Reads, form, HUGE).module
    assert [t._version for t in (module.table, module.prior, module.frozen)] == [0, 0, 0]


# --- importing

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")
LOOK = """
import json, logging, os, random, signal, sys, warnings
import numpy, torch
for seed in (random.seed, numpy.random.seed, torch.manual_seed):
    seed(0)
def look():
    from lightning_utilities.core import rank_zero
    names = ("", "pytorch_lightning", "lightning_fabric", "lightning", "lightning.pytorch", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    return {
        "log": rank_zero.log.name,
        "category": rank_zero.rank_zero_deprecation_category.__module__,
        "loggers": [(each.level, [type(h).__name__ for h in each.handlers], each.propagate) for each in loggers],
        "torch": [str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled()],
        "numbers": [str(numpy.random.get_state()), str(random.getstate()), str(torch.get_rng_state().tolist())],
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)],
        "hooks": [sys.excepthook.__name__, warnings.showwarning.__name__, warnings.formatwarning.__module__],
        "filters": [str(each) for each in warnings.filters if "ightning" in str(each) or "FSDP" in str(each)],
        "environment": dict(os.environ),
    }
"""


def look_after(*imports):
    return json.loads(run("\n".join([LOOK, *[f"import {name}" for name in imports], "print(json.dumps(look()))"])))


@pytest.mark.launch
@pytest.mark.parametrize(
    "others",
    [(), *[(name,) for name in NAMESPACES], ("lightning_fabric",), NAMESPACES, NAMESPACES[::-1]],
    ids=lambda names: " then ".join(names) or "nothing",
)
def test_importing_changes_no_global_state(others):
    """At whichever position among a program's imports ours is."""
    expected = look_after(*others)
    for position in range(len(others) + 1):
        found = look_after(*others[:position], "lightning_gr", *others[position:])
        if position < len(others):
            # importing Lightning draws from Python's generator, whose state our import restores
            found["numbers"] = expected["numbers"]
        assert found == expected, position


@pytest.mark.launch
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("name", NAMESPACES)
def test_the_log_level_set_by_the_user_counts(name, ours_first):
    imports = [f"import {name} as pl", "import lightning_gr"]
    program = f"""
    import logging
    {"; ".join(reversed(imports) if ours_first else imports)}
    logging.getLogger("{name}").setLevel(logging.ERROR)
    pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[lightning_gr.SAM(0.1)])
    from {name}.utilities.rank_zero import rank_zero_info
    rank_zero_info("a line that nobody wants")
    print("end")
    """
    assert run(textwrap.dedent(program), errors=True).strip() == "end"


def run(program, errors=False):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr + done.stdout if errors else done.stdout


def test_the_fingerprint_of_these_tests_runs_no_code():
    """Otherwise the tests above would blame the package for it."""
    TOUCHED.clear()
    same("nothing", as_dict(TOUCHED), as_dict([]))
    fingerprint(Properties())
    assert TOUCHED == []
