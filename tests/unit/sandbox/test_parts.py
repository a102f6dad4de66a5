"""Where parts of a guest are mounted."""

from __future__ import annotations

import pytest

from kvmlite import ConfigError, Mount
from kvmlite.sandbox.parts import in_order
from kvmlite.sandbox.volume_mount import VolumeMount


def test_a_directory_is_mounted_before_what_lies_below_it() -> None:
    below = VolumeMount(name="v", path="/v.raw", target="/srv/data/v")
    above, other, beside = (Mount(source="/a", target=target) for target in ("/srv/", "/opt", "//var"))
    assert in_order((below, above, other, beside)) == (above, other, beside, below)


@pytest.mark.parametrize("again", ["/srv", "/srv/", "//srv", "/srv/.", "/srv/a/.."])
def test_two_mounts_at_one_place_are_refused(again: str) -> None:
    with pytest.raises(ConfigError, match="two mounts at /srv: one would hide the other"):
        in_order((VolumeMount(name="v", path="/v.raw", target="/srv"), Mount(source="/a", target=again)))


@pytest.mark.parametrize("target", ["/", "//", "/.", "/a/.."])
def test_nothing_is_mounted_at_the_root(target: str) -> None:
    with pytest.raises(ConfigError, match="nothing can be mounted at /") as caught:
        in_order((Mount(source="/a", target=target),))
    assert caught.value.hint == "--root boots into a directory"
