"""Where results come from: versions, machine, checksums of texts and vocabularies."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import rnnorm

NAMES = ("rnnorm", "commit", "python", "torch", "machine", "processor", "gpu")


def versions(device: str = "cpu") -> dict[str, str]:
    """Returns what a result depends on beside its settings and data; `device`: where the run was."""
    gpu = device if device.startswith("cuda") else "none"
    found = (
        *(rnnorm.__version__, _commit(), platform.python_version(), torch.__version__),
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        _processor(),
        torch.cuda.get_device_name(gpu) if gpu != "none" and torch.cuda.is_available() else gpu,
    )
    return dict(zip(NAMES, found, strict=True))


def _commit(source: Path = Path(__file__)) -> str:
    """The commit that holds a file; none where its folder is in a repository that does not, as an environment's is."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(source.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        held = git("ls-files", "--", source.name)
        return (git("describe", "--always", "--dirty", "--abbrev=12") if held else "") or "none"
    except OSError:  # no git here
        return "none"


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
