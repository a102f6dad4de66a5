from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmlite.errors import ConfigError, ImageError
from kvmlite.images.modules import FEATURES, parse_modules_dep, plan_modules, wanted_modules


def names(plan: Any) -> list[str]:
    return [module.name for module in plan.load]


def test_dependencies_come_before_what_needs_them(tmp_path: Path, images: Any) -> None:
    directory = images.install_modules(tmp_path, images.VIRTIO)
    plan = plan_modules(str(directory), ("virtio_mmio", "virtio_rng"))
    assert names(plan) == ["virtio_ring", "virtio", "virtio_mmio", "virtio_rng"]
    assert plan.load[3].path == f"{directory}/kernel/drivers/char/hw_random/virtio-rng.ko"


def test_modules_dep_is_believed_where_depmod_has_run(tmp_path: Path, images: Any) -> None:
    directory = images.install_modules(tmp_path, {"a.ko": b"never opened", "b-b.ko": b"", "c.ko": b""})
    (directory / "modules.dep").write_text(
        "kernel/a.ko: kernel/b-b.ko kernel/c.ko\nkernel/b-b.ko: kernel/c.ko\nkernel/c.ko:\n"
    )
    assert names(plan_modules(str(directory), ("a",))) == ["c", "b_b", "a"]


def test_dash_and_underscore_are_the_same(tmp_path: Path, images: Any) -> None:
    directory = images.install_modules(tmp_path, images.VIRTIO)
    assert names(plan_modules(str(directory), ("virtio-rng",)))[-1] == "virtio_rng"
    assert wanted_modules((), ("virtio-rng", "virtio_rng")) == ("virtio_rng",)


def test_builtin_and_missing_modules_are_reported(tmp_path: Path, images: Any) -> None:
    directory = images.install_modules(tmp_path, images.VIRTIO, builtin="ext4 virtio-blk")
    plan = plan_modules(str(directory), ("ext4", "virtio_blk", "9p"))
    assert (plan.load, plan.builtin, plan.missing, plan.unknown) == ((), ("ext4", "virtio_blk"), ("9p",), ())


def test_the_config_tells_where_there_are_no_modules(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("CONFIG_VIRTIO_MMIO=y\nCONFIG_OVERLAY_FS=m\n# CONFIG_9P_FS is not set\n")
    plan = plan_modules(None, ("virtio_mmio", "overlay", "9p", "strange"), config=str(config))
    assert (plan.builtin, plan.missing, plan.unknown) == (("virtio_mmio",), ("overlay", "9p"), ("strange",))


def test_without_modules_and_config_nothing_is_known() -> None:
    assert plan_modules(None, ("virtio_mmio",)).unknown == ("virtio_mmio",)


def test_packed_modules_are_found_by_looking(tmp_path: Path, images: Any) -> None:
    packed = {f"{path}.xz": lzma.compress(data) for path, data in images.VIRTIO.items()}
    directory = images.install_modules(tmp_path, packed)
    assert names(plan_modules(str(directory), ("virtio_mmio",))) == ["virtio_ring", "virtio", "virtio_mmio"]


def test_a_build_tree_lists_objects(tmp_path: Path, images: Any) -> None:
    (tmp_path / "fs").mkdir()
    (tmp_path / "fs/a.ko").write_bytes(images.module())
    (tmp_path / "fs/stray.ko").write_bytes(images.module())
    (tmp_path / "modules.order").write_text("fs/a.o\n")
    (tmp_path / "modules.builtin").write_text("fs/ext4/ext4.o\n")
    plan = plan_modules(str(tmp_path), ("a", "stray", "ext4"))
    assert (names(plan), plan.builtin, plan.missing) == (["a"], ("ext4",), ("stray",))


def test_a_soft_dependency_is_loaded_before_if_it_is_there(tmp_path: Path, images: Any) -> None:
    modules = {
        "crc.ko": images.module(softdep="pre: crc32c absent post: late"),
        "crc32c_generic.ko": images.module(),
        "late.ko": images.module(),
    }
    assert names(plan_modules(str(images.install_modules(tmp_path, modules)), ("crc",))) == ["crc32c_generic", "crc"]


def test_soft_dependencies_and_aliases_of_depmod_are_read(tmp_path: Path, images: Any) -> None:
    directory = images.install_modules(tmp_path, {"a.ko": b"", "b.ko": b""})
    (directory / "modules.dep").write_text("kernel/a.ko:\nkernel/b.ko:\n")
    (directory / "modules.softdep").write_text("# comment\nsoftdep a pre: algorithm-b\n")
    (directory / "modules.alias").write_text("alias algorithm-b b\nalias pci:v* other\n")
    assert names(plan_modules(str(directory), ("a",))) == ["b", "a"]


def test_a_soft_circle_is_no_error(tmp_path: Path, images: Any) -> None:
    modules = {"a.ko": images.module(softdep="pre: b"), "b.ko": images.module(softdep="pre: a")}
    assert names(plan_modules(str(images.install_modules(tmp_path, modules)), ("a",))) == ["b", "a"]


def test_modules_that_need_each_other_are_an_error(tmp_path: Path, images: Any) -> None:
    modules = {"a.ko": images.module("b"), "b.ko": images.module("a")}
    with pytest.raises(ImageError, match="depend on each other in a circle: a -> b -> a"):
        plan_modules(str(images.install_modules(tmp_path, modules)), ("a",))


def test_a_needed_module_that_is_nowhere_is_an_error(tmp_path: Path, images: Any) -> None:
    with pytest.raises(ImageError, match=r"module a in .* needs b, which is not there") as caught:
        plan_modules(str(images.install_modules(tmp_path, {"a.ko": images.module("b")})), ("a",))
    assert "depmod" in caught.value.hint


def test_a_needed_module_may_be_built_in(tmp_path: Path, images: Any) -> None:
    directory = images.install_modules(tmp_path, {"a.ko": images.module("ext4")}, builtin="ext4")
    assert names(plan_modules(str(directory), ("a",))) == ["a"]


def test_a_directory_that_is_not_there_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no modules directory"):
        plan_modules(str(tmp_path / "no"), ("a",))


@pytest.mark.parametrize(
    "text",
    [
        "kernel/a.ko kernel/b.ko\n",
        "kernel/a.ko: /etc/shadow\n",
        "kernel/a.ko: ../../etc/b.ko\n",
        "/lib/a.ko:\n",
        "kernel/a.ko: kernel/b.ko\n",
        "\x7fELF\x02\x01",
        "kernel/a.ko: kernel/b\n",
    ],
)
def test_a_damaged_modules_dep_is_named(tmp_path: Path, images: Any, text: str) -> None:
    directory = images.install_modules(tmp_path, {"a.ko": images.module()})
    (directory / "modules.dep").write_text(text)
    with pytest.raises(ImageError, match=r"modules\.dep.* is damaged") as caught:
        plan_modules(str(directory), ("a",))
    assert caught.value.hint == f"run depmod {images.RELEASE}, or add the kernel again (kvmlite kernel add)"


def test_an_empty_modules_dep_counts_as_none(tmp_path: Path, images: Any) -> None:
    directory = images.install_modules(tmp_path, images.VIRTIO)
    (directory / "modules.dep").write_text("")
    assert names(plan_modules(str(directory), ("virtio",))) == ["virtio_ring", "virtio"]


@given(st.text(alphabet="ab/.:ko \n\t\0-_#é", max_size=80))
def test_any_modules_dep_is_parsed_or_refused(text: str) -> None:
    refusal, found = "modules.dep", {}
    try:
        found = parse_modules_dep("modules.dep", text)
    except ImageError as error:
        refusal = str(error)
    assert "modules.dep" in refusal
    assert "\n" not in refusal
    if found:
        assert all(other in found for needed in found.values() for other in needed)
        assert not any(path.startswith("/") or ".." in path.split("/") for path in found)


def test_features_name_modules_in_load_order() -> None:
    assert wanted_modules(("rng", "mmio")) == ("virtio_mmio", "virtio_rng")
    assert wanted_modules(tuple(FEATURES))[0] == "virtio_mmio"


def test_an_unknown_feature_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="unknown guest feature 'vsok'; allowed are mmio pci") as caught:
        wanted_modules(("vsok",))
    assert caught.value.hint == "did you mean 'vsock'?"
