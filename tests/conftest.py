"""Eight simulated devices, quick compiles, and every jaxtyping shape checked, for all tests of this folder.

The flags are set before jax starts, and the shape checker before `pe_jax` is first imported.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Level 0 halves the time to compile a step; tests compile far more than they compute.
for flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " " + flag

import jaxtyping  # noqa: E402

# The numeric tower: an int is welcome where a float is, as in Python's own typing rules.
jaxtyping.install_import_hook("pe_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="run the tests marked `full` too (make test-full)")


def pytest_configure(config):
    config.addinivalue_line("markers", "full: takes minutes; run by make test-full")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        kept = [item for item in items if "full" not in item.keywords]
        config.hook.pytest_deselected(items=[item for item in items if "full" in item.keywords])
        items[:] = kept
