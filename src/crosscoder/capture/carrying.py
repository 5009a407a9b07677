"""Activations on their way into a buffer: copied beside the forward passes where they have to change GPUs.

Within one device a copy is ordered after the forward that made its source. Between two GPUs, torch makes either one
wait for all that the other has queued; on streams of their own, copies wait for the forward that they belong to, and
the next forward does not wait for them. To and from the CPU a copy waits for itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Carrier:
    """Copies activations into rows; what was copied may be read on its own device after `finish`."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def carry(self, activations: Tensor, rows: Tensor) -> None:
        """Write `activations` into `rows`, of the same shape and maybe of another dtype and device."""
        if activations.device == rows.device or not (activations.is_cuda and rows.is_cuda):
            rows.copy_(activations)
            return
        for device in (activations.device, rows.device):
            self._let_copies_wait(device)
        source, target = self._streams[activations.device], self._streams[rows.device]
        with torch.cuda.stream(target), torch.cuda.stream(source):  # makes each the current one of its device
            rows.copy_(activations, non_blocking=True)
        activations.record_stream(source)
        rows.record_stream(target)

    def finish(self) -> None:
        """Let the computation on every device wait for the copies that are still under way."""
        for device, stream in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(stream)

    def _let_copies_wait(self, device: torch.device) -> None:
        """For all that the computation on `device` has queued so far."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        self._streams[device].wait_stream(torch.cuda.current_stream(device))
