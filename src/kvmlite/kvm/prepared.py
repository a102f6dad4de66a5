"""A VM made before its machine is known."""

from __future__ import annotations

from kvmlite.kvm.system import DEFAULT_PATH, Kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmlite.kvm.vm import Vm


class PreparedVm:
    """A VM with interrupt chips and nothing else.

    Creating the chips starts a grace period in the kernel that the first memory slot waits for (7 ms on the
    development machine). Who starts it here can import the rest of kvmlite meanwhile.
    """

    def __init__(self, path: str = DEFAULT_PATH) -> None:
        self.kvm = Kvm(path)
        self.vm: Vm | None = None
        try:
            self.vm = self.kvm.create_vm()
            self.vm.create_irqchip()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close both. A machine that took the VM does it itself; again is harmless."""
        if self.vm is not None:
            self.vm.close()
        self.kvm.close()
