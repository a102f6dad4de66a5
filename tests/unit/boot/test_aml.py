from __future__ import annotations

import pytest

from kvmlite.boot import aml


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (255, "0aff"),
        (256, "0b0001"),
        (65536, "0c00000100"),
        (2**32, "0e0000000001000000"),
        (2**64 - 1, "0effffffffffffffff"),
    ],
)
def test_integers_take_the_shortest_form(value, code):
    assert aml.integer(value) == bytes.fromhex(code)


@pytest.mark.parametrize(
    ("size", "code"),
    [
        (0, "01"),
        (62, "3f"),
        (63, "4104"),
        (4093, "4fff"),
        (4094, "810001"),
        (2**20 - 4, "8fffff"),
        (2**20 - 3, "c1000001"),
    ],
)
def test_package_length_counts_itself(size, code):
    assert aml.package_length(size) == bytes.fromhex(code)


def test_package_length_has_a_limit():
    assert aml.package_length(2**28 - 5) == bytes.fromhex("cfffffff")
    with pytest.raises(ValueError, match="does not fit"):
        aml.package_length(2**28 - 4)


def test_names():
    assert aml.name_string("_HID") == b"_HID"
    assert aml.name_string("\\_S5_") == b"\\_S5_"
    assert aml.name_string("_SB_.COM1") == b"\x2e_SB_COM1"


@pytest.mark.parametrize("bad", ["ABC", "ABCDE", "abcd", "1ABC", "_SB_.A", "A__A.B__B.C__C", "", "ÄBCD"])
def test_bad_names_are_refused(bad):
    with pytest.raises(ValueError, match=r"AML name|two parts"):
        aml.name_string(bad)


def test_eisa_ids():
    assert aml.eisa_id("PNP0501") == bytes.fromhex("0c41d00501")
    with pytest.raises(ValueError, match="no EISA id"):
        aml.eisa_id("LNRO0005")


def test_objects():
    assert aml.package(aml.integer(5), aml.integer(0)) == bytes.fromhex("120502 0a05 00".replace(" ", ""))
    assert aml.buffer(b"abc") == bytes.fromhex("1106 0a03") + b"abc"
    assert aml.name("_UID", aml.integer(0)) == b"\x08_UID\x00"
    assert aml.string("hi") == b"\x0dhi\x00"
    assert aml.scope("\\_SB_", b"x") == b"\x10\x07\\_SB_x"
    assert aml.device("COM1", b"x") == b"\x5b\x82\x06COM1x"


def test_resource_descriptors():
    assert aml.io_ports(0x3F8, 8) == bytes.fromhex("4701f803f8030108")
    assert aml.memory32_fixed(0xD0000000, 0x1000) == bytes.fromhex("86090001000000d000100000")
    assert aml.interrupt(5) == bytes.fromhex("890600030105000000")
    assert aml.resource_template(aml.interrupt(5)) == bytes.fromhex("110e 0a0b 890600030105000000 7900")
