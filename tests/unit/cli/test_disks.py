from __future__ import annotations

import pytest

from kvmlite import ConfigError, Disk, FormattedDisk
from kvmlite.cli.disks import parse_disk


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("a.img", Disk(path="a.img")),
        ("/x/a b.img,ro", Disk(path="/x/a b.img", read_only=True)),
        ("a.img,rw,direct,serial=data", Disk(path="a.img", direct=True, serial="data")),
        ("a,,b.img,overlay,queues=4,format=raw", Disk(path="a,b.img", overlay="discard", queues=4)),
        (
            "a.img,iops=500,bandwidth=10M,burst=2s,serial=a=b",
            Disk(path="a.img", iops=500, bandwidth=10 << 20, burst_s=2.0, serial="a=b"),
        ),
        ("a.qcow2,format=raw", Disk(path="a.qcow2")),
        ("a.qcow2,format=qcow2", FormattedDisk(path="a.qcow2", format="qcow2")),
        (
            "a,,b,format=vhdx,ro,direct,queues=2",
            FormattedDisk(path="a,b", format="vhdx", read_only=True, direct=True, queues=2),
        ),
    ],
)
def test_a_disk_is_read_from_its_words(text: str, disk: Disk | FormattedDisk) -> None:
    assert parse_disk(text) == disk


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no file"),
        (",ro", "names no file"),
        ("a.img,", "'' means nothing"),
        ("a.img,readonly", "'readonly' means nothing"),
        ("a.img,serial", "'serial' means nothing"),
        ("a.img,ro=1", "'ro=1' means nothing"),
        ("a.img,iops=many", "--disk iops 'many' is not a whole number"),
        ("a.img,iops=-1", "limits of"),
        ("a.img,bandwidth=fast", "--disk bandwidth 'fast' is not a size"),
        ("a.img,burst=0", "--disk burst '0' is not a time"),
        ("a.img,format=zip", "--disk format 'zip' is unknown"),
        ("a.QCOW2,ro", "is not said to be qcow2, and without that a disk is raw"),
        ("a.vdi,format=vdi,serial=x", "serial is for raw images"),
        ("a.vdi,format=vdi,overlay", "overlay is for raw images"),
        ("a.img,ro,overlay", "a read-only disk needs no overlay"),
        ("a.img,queues=0", "0 queues, allowed are 1 to 16"),
    ],
)
def test_what_is_not_a_disk_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse_disk(text)
    assert message in str(raised.value)
