"""What kvmlite promises to callers: these names, each with its docstring, and nothing loaded before it is used."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from importlib.metadata import version
from types import ModuleType

import pytest
from support.requirements import ROOT

import kvmlite
from kvmlite import errors, lowlevel, testing
from kvmlite.machine.outcome import Outcome

# A name enters here in the commit that makes it public, with a line in CHANGELOG.md.
PUBLIC = {
    "kvmlite": """
        Balloon BootError CommandFailed ConfigError Console Disk ExecFailed ExitReport Exited FormattedDisk GuestConfig HostError
        HostRoot Hung ImageError Kernel KvmError KvmliteError LinuxGuest Lost Machine MachineConfig Mount Net Network Panicked Pmem PoweredOff
        Reset Result Rng SharedDirectory
        StateError Stopped TimedOut TripleFault UnsupportedError VmmError Vsock run
    """,
    "kvmlite.lowlevel": """
        Bus DescriptorChain DeviceLoop DeviceResources EntryState EventFd GuestFault GuestMemory GuestMemoryError
        KernelImage Kvm MemoryRegion MmioTransport PreparedVm QueueLayout Vcpu Virtqueue Vm enter_long64
        enter_protected32 init_kick_signal load_kernel open_kernel read_config_bytes ring0_speed
    """,
    "kvmlite.testing": "DriverQueue FakeInterrupt ManualLoop MmioDriver Used VirtioRig check_virtio_device",
}
MODULES = [kvmlite, lowlevel, testing]
LAZY = [kvmlite, lowlevel]
NAMES = [(module, name) for module in MODULES for name in module.__all__]

each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
each_lazy_module = pytest.mark.parametrize("module", LAZY, ids=lambda module: module.__name__)
each_name = pytest.mark.parametrize(("module", "name"), NAMES, ids=[f"{m.__name__}.{n}" for m, n in NAMES])


@each_module
def test_the_public_names_are_these(module: ModuleType) -> None:
    assert set(module.__all__) == set(PUBLIC[module.__name__].split())


@each_module
def test_the_public_names_are_sorted_and_unique(module: ModuleType) -> None:
    assert list(module.__all__) == sorted(set(module.__all__))


@each_name
def test_every_public_name_has_a_docstring_of_its_own(module: ModuleType, name: str) -> None:
    value = getattr(module, name)
    text = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    assert text, f"{module.__name__}.{name}"
    assert text.splitlines()[0].strip()


@each_name
def test_every_public_method_has_a_docstring(module: ModuleType, name: str) -> None:
    value = getattr(module, name)
    members = vars(value) if inspect.isclass(value) else {}
    undocumented = [
        member
        for member, function in members.items()
        if not member.startswith("_")
        and (inspect.isfunction(function) or isinstance(function, property))
        and not function.__doc__
    ]
    assert undocumented == []


@each_lazy_module
def test_the_table_of_homes_names_each_public_name_once_and_where_it_is_defined(module: ModuleType) -> None:
    assert sorted(name for names in module._HOMES.values() for name in names) == sorted(module.__all__)
    for home, names in module._HOMES.items():
        for name in names:
            assert getattr(importlib.import_module(home), name) is getattr(module, name)


@each_lazy_module
def test_dir_lists_the_public_names_before_they_are_used(module: ModuleType) -> None:
    assert dir(module) == sorted(module.__all__)


@each_lazy_module
def test_an_unknown_name_is_an_attribute_error(module: ModuleType) -> None:
    with pytest.raises(AttributeError, match=rf"module '{module.__name__}' has no attribute 'no_such_name'"):
        module.no_such_name  # noqa: B018


@each_lazy_module
def test_star_import_gives_exactly_the_public_names(module: ModuleType) -> None:
    probe = f"from {module.__name__} import *; print(*[name for name in dir() if not name.startswith('_')])"
    assert run_python(probe).split() == sorted(module.__all__)


def test_importing_kvmlite_imports_nothing_else_of_it() -> None:
    probe = "import sys, kvmlite.lowlevel; print(*sorted(name for name in sys.modules if 'kvmlite' in name))"
    assert run_python(probe).split() == ["kvmlite", "kvmlite.lowlevel"]


def test_every_outcome_a_machine_can_have_is_public() -> None:
    assert {kind.__name__ for kind in Outcome.__args__} <= set(kvmlite.__all__)


def test_every_error_but_the_guests_own_is_public() -> None:
    raised = {name for name, value in vars(errors).items() if inspect.isclass(value)} - {"GuestFault"}
    assert raised <= set(kvmlite.__all__)


def test_the_version_is_the_distributions() -> None:
    assert kvmlite.__version__ == version("kvmlite")


def run_python(program: str) -> str:
    """What it prints, run by a fresh interpreter."""
    env = {"PYTHONPATH": ":".join([str(ROOT / "src"), *sys.path[1:]])}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout
