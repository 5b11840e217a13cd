"""What a run ran on: versions, device, threads; and which differences can change its bits."""

import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import resdiag

CHANGES_BITS = (
    "resdiag", "torch", "threads", "device", "device_name", "dtype", "cpu_capability",
    "cuda", "cudnn",
)  # fmt: skip
"""Fields of `environment` after whose change the same command may give other bits."""


def environment(device: str, dtype: str) -> dict[str, Any]:
    """Describe this process and machine as plain data for a run's `run.json`.

    Args:
        device: Where the run computes: "cpu", "cuda", "cuda:1", ...
        dtype: Of the run's arithmetic.
    """
    kind = torch.device(device).type
    cuda = kind == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "resdiag": resdiag.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "device": kind,
        "device_name": torch.cuda.get_device_name(device) if cuda else _cpu_name(),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "git": _git_commit(Path(resdiag.__file__).parents[1]),
    }


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Changes between two environments that can change bits, as "threads: 1 -> 2".

    >>> differences({"threads": 1, "git": "a"}, {"threads": 2, "git": "b"})
    ['threads: 1 -> 2']
    """
    return [
        f"{key}: {old.get(key)} -> {new.get(key)}"
        for key in CHANGES_BITS
        if old.get(key) != new.get(key)
    ]


def _cpu_name() -> str:
    """The processor's model name; Linux keeps it where `platform.processor` does not look."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _git_commit(checkout: Path) -> str | None:
    """The commit of resdiag's own checkout; None where it is installed or git is missing."""
    if not (checkout / ".git").exists():  # not the repository that happens to hold site-packages
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
