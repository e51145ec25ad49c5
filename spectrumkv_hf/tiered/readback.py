"""Numbers on their way between a device and the host, for which nobody waits."""

import torch


class Readback:
    """Booleans on their way from a device to the host.

    Args:
        flags: Bool `[any]`.
    """

    def __init__(self, flags: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._flags = flags
        if flags.is_cuda:
            self._flags = torch.empty(len(flags), dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
            self._event = torch.cuda.current_stream(flags.device).record_event()

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
