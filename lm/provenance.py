"""Where results come from: versions, machine, checksums of texts and vocabularies."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import rnnorm


def versions(device: str = "cpu") -> dict[str, str]:
    """Returns what a result depends on beside its settings and data; `device`: where the run was."""
    gpu = device if device.startswith("cuda") else "none"
    return {
        "rnnorm": rnnorm.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name(gpu) if gpu != "none" and torch.cuda.is_available() else gpu,
    }


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:  # no git here
        return "none"
    return printed.strip() or "none"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def collect(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[str]]]:
    """Returns the distinct checksums of each split's text and vocabulary, and the distinct versions."""
    versions = [{"gpu": "none"} | result["versions"] for result in results]  # older results do not name one
    return {
        "data_sha256": _distinct(results, "data_sha256"),
        "vocabulary_sha256": _distinct(results, "vocabulary_sha256"),
        "versions": {key: sorted({each[key] for each in versions}) for key in (versions[0] if versions else ())},
    }


def _distinct(results: Sequence[Mapping[str, Any]], name: str) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for score in (score for result in results for score in result["scores"]):
        found.setdefault(score["split"], set()).add(score[name])
    return {split: sorted(values) for split, values in found.items()}
