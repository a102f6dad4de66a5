from __future__ import annotations

import pytest

from kvmlite.images.loader_config import LoaderEntry, choose_newest, parse_bls, parse_extlinux, parse_grub

DEBIAN = """\
set default="0"
if [ x"${feature_menuentry_id}" = xy ]; then
  menuentry_id_option="--id"
fi
function gfxmode {
	set gfxpayload="${1}"
}
menuentry 'Debian GNU/Linux' --class debian {
	insmod gzio
	if [ x$grub_platform = xxen ]; then insmod xzio; fi
	linux	/boot/vmlinuz-6.1.0-9-amd64 root=UUID=12 ro net.ifnames=0 console=tty0 console=ttyS0,115200 quiet
	initrd	/boot/initrd.img-6.1.0-9-amd64
}
submenu 'Advanced options' {
	menuentry 'Debian, with Linux 6.1.0-8' {
		linux	/boot/vmlinuz-6.1.0-8-amd64 root=UUID=12 ro single
	}
	menuentry 'Debian, with Linux 6.1.0-7' {
		linux	/boot/vmlinuz-6.1.0-7-amd64 root=UUID=12
	}
}
menuentry 'Memtest' {
	linux16	/boot/memtest86+.bin
}
"""


def entry(kernel: str, *arguments: str) -> LoaderEntry:
    return LoaderEntry(kernel=kernel, arguments=arguments)


@pytest.mark.parametrize(
    ("default", "expected"),
    [
        ("0", entry("/boot/vmlinuz-6.1.0-9-amd64", "net.ifnames=0")),
        ("1", entry("/boot/vmlinuz-6.1.0-8-amd64", "single")),
        ("2", entry("/boot/memtest86+.bin")),
        ("7", entry("/boot/vmlinuz-6.1.0-9-amd64", "net.ifnames=0")),
        ("${next_entry}", entry("/boot/vmlinuz-6.1.0-9-amd64", "net.ifnames=0")),
        ("1>2", entry("/boot/vmlinuz-6.1.0-9-amd64", "net.ifnames=0")),
    ],
)
def test_grub_boots_its_default(default: str, expected: LoaderEntry) -> None:
    assert parse_grub(DEBIAN.replace('default="0"', f'default="{default}"')) == expected


def test_a_device_before_the_path_is_left_out() -> None:
    assert parse_grub("menuentry x {\nlinux ($root)/vmlinuz a=1 $opts\n}") == entry("/vmlinuz", "a=1")


@pytest.mark.parametrize(
    "text", ["", "linux /outside", "menuentry x {\n}", "menuentry x {\nlinux $kernel\n}", "}\n}\n{"]
)
def test_grub_without_an_entry_boots_nothing(text: str) -> None:
    assert parse_grub(text) is None


EXTLINUX = """\
DEFAULT two
TIMEOUT 10
LABEL one
  LINUX ../vmlinuz-1
LABEL two
  MENU LABEL Two
  KERNEL /vmlinuz-2
  APPEND initrd=/initrd root=/dev/sda1 audit=0
"""


def test_extlinux_boots_its_default_or_the_first() -> None:
    assert parse_extlinux(EXTLINUX) == entry("/vmlinuz-2", "audit=0")
    assert parse_extlinux(EXTLINUX.replace("DEFAULT two", "DEFAULT three")) == entry("/../vmlinuz-1")
    assert parse_extlinux("TIMEOUT 1") is None


def test_a_bls_entry_is_keys_and_values() -> None:
    text = "title Fedora\nversion 6.5\nlinux /vmlinuz-6.5\ninitrd /initrd-6.5\noptions root=/dev/vda3 ro\noptions selinux=0\n"
    assert parse_bls(text) == entry("/vmlinuz-6.5", "selinux=0")
    assert parse_bls("title nothing\n") is None


def test_the_newest_entry_is_chosen_and_rescue_last() -> None:
    names = {"a-6.9.conf": entry("/9"), "a-6.10.conf": entry("/10"), "a-0-rescue-9.conf": entry("/rescue")}
    assert choose_newest(names) == entry("/10")
    assert choose_newest({"a-0-rescue.conf": entry("/rescue")}) == entry("/rescue")
    assert choose_newest({}) is None
