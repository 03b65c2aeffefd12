"""XLA told to compile quickly rather than well: what the tests compile they hardly compute."""

from importlib import metadata


def flags(devices: int | None = None, *, trains: bool = False) -> str:
    """For XLA_FLAGS, of a process with so many simulated devices; `trains` where it computes for a while too."""
    found = []
    if not trains:
        # A step of a tiny model compiles in a quarter of the time, and takes two and a half times as long.
        found.append("--xla_backend_optimization_level=0")
    if tuple(map(int, metadata.version("jaxlib").split(".")[:2])) < (0, 12):
        # The older emitters of fused loops, without MLIR: a third of the time. Newer versions have none to choose.
        found.append("--xla_cpu_use_fusion_emitters=false")
    if devices is not None:
        found.append(f"--xla_force_host_platform_device_count={devices}")
    return " ".join(found)
