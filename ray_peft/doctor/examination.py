"""The examination of a machine: one probe per question, which gives findings and never a traceback."""

from __future__ import annotations

from dataclasses import replace

from ray_peft.doctor import hardware, services
from ray_peft.doctor.findings import Finding, guarded
from ray_peft.foundation.masking import mask_address

PROBES = (*hardware.PROBES, *services.PROBES)
"""In the order of the table, each with the name under which an error of its own is shown."""


def examine() -> list[Finding]:
    """All findings, in the order of the table. Takes some seconds: it imports torch and bitsandbytes."""
    findings = [finding for name, probe in PROBES for finding in guarded(name, probe)]
    return [replace(f, value=mask_address(f.value), advice=mask_address(f.advice)) for f in findings]
