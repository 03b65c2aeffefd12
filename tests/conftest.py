"""Eight simulated devices, quick compiles, and every jaxtyping shape checked, for all tests of this folder.

The flags are set before jax starts, and the shape checker before `pe_jax` is first imported.
"""

import os

from tests import quick

os.environ["JAX_PLATFORMS"] = "cpu"
for flag in quick.flags(devices=8).split():
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " " + flag

import jaxtyping  # noqa: E402

# The numeric tower: an int is welcome where a float is, as in Python's own typing rules.
jaxtyping.install_import_hook("pe_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the tests marked `full` too (make test-full)")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: takes minutes; run by make test-full")


LONGEST = ("test_notebooks.py", "test_train.py")  # begun first, so that no worker is left with one at the end


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not config.getoption("--full"):
        kept = [item for item in items if "full" not in item.keywords]
        config.hook.pytest_deselected(items=[item for item in items if "full" in item.keywords])
        items[:] = kept
