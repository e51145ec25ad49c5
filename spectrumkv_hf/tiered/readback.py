"""Numbers on their way between a device and the host, for which nobody waits."""

from collections.abc import Sequence

import torch


class Readback:
    """Booleans on their way from a device to the host.

    Args:
        flags: Bool `[any]` each, one at least, all on one device.
    """

    def __init__(self, flags: Sequence[torch.Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._flags = torch.cat(list(flags)) if len(flags) > 1 else flags[0]
        if self._flags.is_cuda:
            device = self._flags.device
            pinned = torch.empty(len(self._flags), dtype=torch.bool, pin_memory=True)
            self._flags = pinned.copy_(self._flags, non_blocking=True)
            self._event = torch.cuda.current_stream(device).record_event()

    def read(self) -> list[bool]:
        """The booleans, once the device has come so far."""
        if self._event is not None:
            self._event.synchronize()
        return self._flags.tolist()


def send(numbers: torch.Tensor, target: torch.Tensor) -> None:
    """Copy numbers that lie on the host to a tensor on a device, once the device has come so far.

    From memory that is not pinned the host would wait for the device, even for a single number.
    """
    target.copy_(numbers.pin_memory() if target.is_cuda else numbers, non_blocking=True)
