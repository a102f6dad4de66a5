"""What a card may carry."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from support.net import Plug

from kvmlite import Net
from kvmlite.abi.virtio_net import VIRTIO_NET_HDR
from kvmlite.errors import ConfigError

NO_HEADER = bytes(VIRTIO_NET_HDR.size)
Plugger = Callable[..., Plug]


@pytest.mark.parametrize("limits", [{"bandwidth": -1}, {"packets": -1}, {"burst_s": 0}, {"burst_s": 3601}])
def test_limits_that_make_no_sense_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="net: limits of"):
        Net(backend=None, **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("framing", ["tap", "stream"])
@pytest.mark.parametrize("limits", [{"packets": 200, "burst_s": 0.05}, {"bandwidth": 20_000, "burst_s": 0.05}])
def test_frames_beyond_a_burst_come_at_the_rate(plug: Plugger, framing: str, limits: dict[str, float]) -> None:
    """10 frames of 100 bytes at once, then one each 5 ms."""
    made = plug(framing, rig={"queue_size": 64}, **limits)
    frame = bytes(100)
    begin = time.monotonic()
    for _ in range(30):
        made.tx.add_chain(readable=[NO_HEADER + frame])
        made.rx.add_chain(writable=[200])
        made.host.send(NO_HEADER + frame if framing == "tap" else b"\0\0\0\x64" + frame)
    made.rig.kick(0)
    made.rig.kick(1)
    while made.tx.used_idx < 30 or made.rx.used_idx < 30:
        assert time.monotonic() - begin < 30
        time.sleep(0.001)
    assert time.monotonic() - begin >= 0.09
    assert made.device.statistics().pauses > 0
    made.rig.restart()
    assert made.rig.driver.status == 15


def test_a_card_with_limits_is_not_the_kernels(plug: Plugger) -> None:
    with pytest.raises(ConfigError, match="without limits or rules"):
        plug(packets=1, vhost="on")
