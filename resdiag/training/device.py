"""What `--device` may say, and which of it this machine has."""

import re

from resdiag.errors import UsageError, unknown


def check_device(name: str) -> str:
    """A name as it is, if some machine has such a device; without importing torch.

    Raises:
        UsageError: Naming the valid ones.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise unknown("device", name, ["auto", "cpu", "cuda", "cuda:N"])
    return name


def find_device(name: str) -> str:
    """The device that a name means on this machine.

    Raises:
        UsageError: It is not here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and not int(index or 0) < torch.cuda.device_count():
        raise UsageError(f"device '{name}' is not here", f"{torch.cuda.device_count()} GPUs found")
    return name


def warn_of_dtype(device: str, dtype: str) -> str:
    """What to say of a number format that the device computes slowly, or "".

    Without AVX-512 a CPU has no instructions for bfloat16, and oneDNN's substitute took ten times
    as long as float32.
    """
    import torch

    if dtype != "bfloat16" or device != "cpu":
        return ""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512"):
        return ""
    return (
        f"bfloat16 is slower than float32 on this CPU ({capability}, not AVX-512): --dtype float32"
    )
