from __future__ import annotations

import pytest

from kvmlite.abi.layout import virtio_mmio_window
from kvmlite.boot.cmdline import (
    add_virtio_mmio,
    compose_cmdline,
    encode_cmdline,
    parameter_name,
    split_cmdline,
)
from kvmlite.errors import ConfigError


def test_defaults_come_first_and_give_way_to_the_user():
    assert (
        compose_cmdline("console=hvc0 quiet", defaults=["console=ttyS0", "panic=-1"]) == "panic=-1 console=hvc0 quiet"
    )


def test_dashes_and_underscores_are_the_same():
    assert compose_cmdline("log_buf_len=1M", defaults=["log-buf-len=4M"]) == "log_buf_len=1M"


def test_defaults_go_before_what_is_for_init():
    assert compose_cmdline("a -- panic=1", defaults=["panic=-1"]) == "panic=-1 a -- panic=1"


def test_virtio_mmio_devices_are_described():
    windows = [virtio_mmio_window(0), virtio_mmio_window(1)]
    assert (
        add_virtio_mmio("quiet", windows)
        == "virtio_mmio.device=4K@0xd0000f00:5 virtio_mmio.device=4K@0xd0002f00:6 quiet"
    )


def test_device_described_twice_is_refused():
    with pytest.raises(ConfigError, match=r"already has virtio_mmio\.device=4K@0xd0000f00:5"):
        add_virtio_mmio("virtio_mmio.device=4K@0xd0000f00:5", [virtio_mmio_window(0)])


def test_quoted_values_stay_together():
    assert split_cmdline('a="b c"  d\te "f g"=h') == ['a="b c"', "d", "e", '"f g"=h']
    assert parameter_name('"dyn-dbg=file x +p"') == "dyn_dbg"


def test_unclosed_quote_is_refused():
    with pytest.raises(ConfigError, match="unclosed double quote"):
        compose_cmdline('a="b c')


@pytest.mark.parametrize("name", ["root", "init", "rdinit", "panic"])
def test_two_values_of_a_single_parameter_are_refused(name):
    with pytest.raises(ConfigError, match=f"both {name}=1 and {name}=2"):
        compose_cmdline(f"{name}=1 console=ttyS0 {name}=2")
    assert compose_cmdline(f"{name}=1 {name}=1") == f"{name}=1 {name}=1"


def test_repeatable_parameters_may_repeat():
    assert compose_cmdline("console=tty0 console=ttyS0") == "console=tty0 console=ttyS0"


def test_same_name_for_init_is_no_contradiction():
    assert compose_cmdline("init=/a -- init=/b") == "init=/a -- init=/b"


@pytest.mark.parametrize(("text", "name"), [("a\0", "a NUL byte"), ("a\n", "a line break"), ("a\r", "a carriage")])
def test_control_characters_are_refused(text, name):
    with pytest.raises(ConfigError, match=f"contains {name}.* at offset 1"):
        encode_cmdline(text)


def test_bytes_that_are_no_utf8_pass_through():
    assert encode_cmdline("x=\udcff") == b"x=\xff"
