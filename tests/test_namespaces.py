"""Packages that only we have imported are hidden, and restored as soon as anything in them is imported."""

import json
import subprocess
import sys
import textwrap

import pytest

from lightning_gr._namespaces import _added

pytestmark = pytest.mark.launch


def run(program):
    """Run a program in another process and return the JSON that it prints."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_packages_that_only_we_import_are_hidden():
    roots = run("""
    import sys, json
    import lightning_gr
    print(json.dumps(sorted({"lightning", "lightning_fabric", "pytorch_lightning"}.intersection(sys.modules))))
    """)
    assert roots == []


def test_packages_imported_by_the_user_stay():
    found = run("""
    import sys, json
    import lightning.pytorch as pl
    trainer = pl.Trainer
    import lightning_gr
    shown = sorted({"lightning", "lightning_fabric", "pytorch_lightning"}.intersection(sys.modules))
    print(json.dumps([shown, sys.modules["lightning.pytorch"].Trainer is trainer]))
    """)
    assert found == [["lightning"], True]


@pytest.mark.parametrize(
    "statement",
    [
        "import pytorch_lightning as pl; Callback = pl.Callback",
        "from pytorch_lightning.callbacks import Callback",
        "from pytorch_lightning.callbacks.callback import Callback",
        "import lightning; Callback = lightning.Callback",
        "import lightning.pytorch as pl; Callback = pl.Callback",
        "from lightning.pytorch import Callback",
        "from lightning.pytorch.callbacks.callback import Callback",
        "import importlib; Callback = importlib.import_module('lightning.pytorch.callbacks').Callback",
    ],
)
def test_any_import_finds_the_base_classes_of_ours(statement):
    found = run(f"""
    import json, sys
    import lightning_gr
    {statement}
    root = sys.modules[Callback.__module__.partition(".")[0]]
    own = [type(root.__spec__.loader).__name__, type(root.__loader__).__name__]
    print(json.dumps([issubclass(lightning_gr.SAM, Callback), *own]))
    """)
    assert found == [True, "SourceFileLoader", "SourceFileLoader"]


def test_find_spec_works_and_does_not_count_as_an_import():
    found = run("""
    import importlib.util, json, sys
    import lightning_gr
    spec = importlib.util.find_spec("lightning")
    print(json.dumps([spec.origin.endswith("__init__.py"), "lightning" in sys.modules]))
    """)
    assert found == [True, False]


def test_all_packages_are_restored_and_the_finder_is_removed():
    found = run("""
    import json, sys
    import lightning_gr
    import pytorch_lightning, lightning.fabric
    ours = [finder for finder in sys.meta_path if type(finder).__module__.startswith("lightning_gr")]
    names = ("lightning_fabric.fabric", "pytorch_lightning.trainer", "lightning.pytorch.trainer")
    print(json.dumps([len(ours), *[name in sys.modules for name in names]]))
    """)
    assert found == [0, True, True, True]


def test_our_error_is_a_subclass_of_those_of_each_namespace():
    found = run("""
    import json
    from lightning_gr._compat import MisconfigurationException as Ours
    from pytorch_lightning.utilities.exceptions import MisconfigurationException as First
    from lightning.pytorch.utilities.exceptions import MisconfigurationException as Second
    print(json.dumps([issubclass(Ours, First), issubclass(Ours, Second)]))
    """)
    assert found == [True, True]


def test_warning_filters_that_were_added_in_front():
    assert _added([1, 2, 3], [2, 3]) == [1]
    assert _added([3, 1, 2], [1, 2, 3]) == [3]
    assert _added([1, 2], [1, 2]) == []
