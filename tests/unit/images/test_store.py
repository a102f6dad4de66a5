from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.requirements import lack

from kvmlite.errors import ConfigError, HostError, StateError
from kvmlite.images.kernel_source import add_kernel
from kvmlite.images.store import KernelStore


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A KVMLITE_HOME of its own for the test; in memory where that can be, for it is made and removed a hundred times."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=memory, prefix="kvmlite-test-") as folder:
        path = Path(folder, "home")
        monkeypatch.setenv("KVMLITE_HOME", str(path))
        yield path


@pytest.fixture
def store(home: Path) -> KernelStore:
    return KernelStore()


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: type("C", (), {"syncfs": staticmethod(lambda fd: 0)}))


def add(store: KernelStore, tmp_path: Path, images: Any, release: str, **keywords: Any) -> Any:
    tree = tmp_path / f"package-{release}"
    if not tree.exists():
        images.package(tree, release=release, modules={"a.ko": images.module(release=release)})
    return add_kernel(store, str(tree), **keywords)


def visible(store: KernelStore) -> list[str]:
    """Everything in the store but its lock and its (possibly empty) directory of names."""
    found = (
        [name for name in os.listdir(store.root) if name not in (".lock", "names")] if os.path.isdir(store.root) else []
    )
    names = os.path.join(store.root, "names")
    return found + (os.listdir(names) if os.path.isdir(names) else [])


def test_an_added_kernel_has_all_its_files(store: KernelStore, tmp_path: Path, images: Any) -> None:
    kernel = add_kernel(store, str(images.package(tmp_path / "p")))
    directory = f"{store.root}/{kernel.digest}"
    assert Path(kernel.path).read_bytes() == images.bzimage()
    assert kernel.path == f"{directory}/vmlinuz"
    assert kernel.config == f"{directory}/config"
    assert kernel.modules_dir == f"{directory}/modules/lib/modules/{images.RELEASE}"
    assert os.path.isfile(f"{kernel.modules_dir}/kernel/drivers/virtio/virtio.ko")
    assert (kernel.name, kernel.release, kernel.names) == (images.RELEASE, images.RELEASE, (images.RELEASE,))
    assert os.listdir(store.root).count(".lock") == 1
    assert sorted(visible(store)) == sorted([kernel.digest, images.RELEASE])


def test_the_manifest_is_json_with_a_format(store: KernelStore, tmp_path: Path, images: Any) -> None:
    kernel = add_kernel(store, str(images.package(tmp_path / "p")))
    manifest = json.loads(Path(f"{store.root}/{kernel.digest}/manifest.json").read_text())
    assert manifest.pop("added").endswith("Z")
    assert manifest.pop("files")["vmlinuz"] == kernel.digest == manifest.pop("digest")
    assert manifest == {
        "format": 1, "arch": "x86_64", "image": "vmlinuz", "name": images.RELEASE, "version": images.RELEASE,
        "source": f"tree:{tmp_path}/p", "spec": f"{tmp_path}/p", "modules": {"files": 6, "size": manifest["modules"]["size"]},
    }  # fmt: skip


def test_a_kernel_is_found_by_name_release_version_and_digest(store: KernelStore, tmp_path: Path, images: Any) -> None:
    old = add(store, tmp_path, images, "6.1.0-7-cloud-amd64", name="old")
    new = add(store, tmp_path, images, "6.12.1-amd64", name="new")
    for text in ("old", "6.1.0-7-cloud-amd64", "6.1", "6.1.0", old.digest, old.digest[:8], old.digest[:8].upper()):
        assert store.find(text).digest == old.digest, text
    assert store.find("6.12").digest == new.digest


def test_a_kernel_is_found_by_its_package_and_by_what_was_asked_for(
    store: KernelStore, tmp_path: Path, images: Any
) -> None:
    for number, release in ((7, "6.1.0-7"), (8, "6.1.0-8")):
        with store.staging() as staging:
            from kvmlite.images.entries import Draft

            draft = Draft(staging)
            Path(draft.path, "vmlinuz").write_bytes(images.bzimage(release))
            store.publish(
                draft, release=release, source=f"deb:linux-image-{release}=6.1.{number}", spec="linux-image-cloud-amd64"
            )
    assert store.find("linux-image-6.1.0-7").release == "6.1.0-7"
    assert store.find("linux-image-cloud-amd64").release == "6.1.0-8"


def test_an_ambiguous_name_lists_the_choices(store: KernelStore, tmp_path: Path, images: Any) -> None:
    add(store, tmp_path, images, "6.1.0-7", name="a")
    add(store, tmp_path, images, "6.1.0-8", name="b")
    with pytest.raises(ConfigError, match=r"kernel '6\.1' is ambiguous: a \([0-9a-f]{12}\), b \([0-9a-f]{12}\)"):
        store.find("6.1")


def test_an_unknown_name_gets_a_suggestion(store: KernelStore, tmp_path: Path, images: Any) -> None:
    with pytest.raises(ConfigError, match="no kernel 'x' in the store") as caught:
        store.find("x")
    assert caught.value.hint == "the store is empty: kvmlite kernel add"
    add(store, tmp_path, images, "6.1.0-7", name="stable")
    with pytest.raises(ConfigError) as caught:
        store.find("stabel")
    assert caught.value.hint == "did you mean stable?"
    for text in ("../x", "", "a/b", "x\0"):
        with pytest.raises(ConfigError):
            store.find(text)


def test_the_same_kernel_again_adds_up_its_names(store: KernelStore, tmp_path: Path, images: Any) -> None:
    first = add(store, tmp_path, images, "6.1.0-7")
    second = add(store, tmp_path, images, "6.1.0-7", name="mine")
    assert first.digest == second.digest
    assert second.names == ("6.1.0-7", "mine")
    assert len(store.kernels()) == 1


def test_new_modules_of_the_same_kernel_replace_the_old_ones(store: KernelStore, tmp_path: Path, images: Any) -> None:
    tree = images.package(tmp_path / "p", modules={"a.ko": images.module()})
    add_kernel(store, str(tree))
    images.install_modules(tree, {"b.ko": images.module()})
    kernel = add_kernel(store, str(tree))
    assert os.listdir(f"{kernel.modules_dir}/kernel") == ["b.ko"]
    assert len(visible(store)) == 2


def test_another_kernel_of_the_same_release_gets_a_number(store: KernelStore, tmp_path: Path, images: Any) -> None:
    add_kernel(store, str(images.package(tmp_path / "p")))
    second = add_kernel(store, str(images.package(tmp_path / "q", padding=16)))
    assert second.name == f"{images.RELEASE}-2"


def test_a_name_belongs_to_one_kernel_until_it_is_taken_away(store: KernelStore, tmp_path: Path, images: Any) -> None:
    add(store, tmp_path, images, "6.1.0-7", name="dev")
    with pytest.raises(ConfigError, match="the name 'dev' belongs to another kernel") as caught:
        add(store, tmp_path, images, "6.1.0-8", name="dev")
    assert "--replace" in caught.value.hint
    assert len(store.kernels()) == 1
    taken = add(store, tmp_path, images, "6.1.0-8", name="dev", replace=True)
    assert store.find("dev").digest == taken.digest
    assert [kernel.names for kernel in store.kernels()] == [(), ("dev",)]


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "-x", "a b", "ä", "x" * 129])
def test_a_name_that_cannot_be_one_is_refused_before_any_work(store: KernelStore, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a kernel"):
        add_kernel(store, "/nowhere", name=name)
    assert not os.path.exists(store.root)


def test_the_default_is_the_marked_one_else_the_last_cloud_kernel(
    store: KernelStore, tmp_path: Path, images: Any
) -> None:
    assert store.default() is None
    plain = add(store, tmp_path, images, "6.0.0")
    assert store.default() == plain
    cloud = add(store, tmp_path, images, "6.1.0-cloud")
    add(store, tmp_path, images, "6.2.0")
    assert store.default() == cloud
    store.set_default(plain)
    assert store.default() == plain
    store.remove(plain)
    assert store.default() == cloud


def test_a_removed_kernel_leaves_nothing(store: KernelStore, tmp_path: Path, images: Any) -> None:
    kernel = add(store, tmp_path, images, "6.1.0-7", name="dev")
    store.set_default(kernel)
    store.remove(kernel)
    assert visible(store) == []
    with pytest.raises(StateError, match="removed by another process"):
        store.remove(kernel)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda directory: (directory / "manifest.json").write_text("{"), r"is damaged: manifest\.json: Expecting"),
        (lambda directory: (directory / "manifest.json").write_text("[]"), r"is damaged: manifest\.json"),
        (lambda directory: (directory / "manifest.json").write_text('{"format": 1}'), r"manifest\.json has no 'image'"),
        (
            lambda directory: (directory / "manifest.json").write_text('{"format": 9}'),
            "has format 9; this kvmlite reads 1",
        ),
        (lambda directory: (directory / "manifest.json").unlink(), "is damaged: .*No such file"),
        (lambda directory: (directory / "vmlinuz").unlink(), "has lost its image vmlinuz"),
    ],
)
def test_a_damaged_entry_is_described_and_the_others_stay(
    store: KernelStore, tmp_path: Path, images: Any, damage: Any, reason: str
) -> None:
    bad = add(store, tmp_path, images, "6.1.0-7")
    good = add(store, tmp_path, images, "6.1.0-8")
    damage(Path(store.root, bad.digest))
    assert store.kernels() == (good,)
    assert len(store.broken) == 1

    assert re.search(reason, store.broken[0])


def test_a_full_disk_leaves_nothing(store: KernelStore, tmp_path: Path, images: Any) -> None:
    """The real thing, with a file size limit in the place of a full disk."""
    import resource

    tree = images.package(tmp_path / "p", padding=1 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(HostError, match=rf"^cannot add {tree} to .*: File too large$") as caught:
            add_kernel(store, str(tree))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "ulimit -f" in caught.value.hint
    assert visible(store) == []


@pytest.mark.root
def test_no_space_left_leaves_nothing(home: Path, tmp_path: Path, images: Any) -> None:
    import subprocess

    home.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(home)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        lack("root", f"cannot mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        store = KernelStore()
        with pytest.raises(HostError, match=r"No space left on device$") as caught:
            add_kernel(store, str(images.package(tmp_path / "p", padding=1 << 20)))
        assert "KVMLITE_HOME" in caught.value.hint
        assert visible(store) == []
        assert add(store, tmp_path, images, "6.1.0-7").name == "6.1.0-7"
    finally:
        subprocess.run(["umount", str(home)], check=True)


def test_ctrl_c_at_any_moment_leaves_all_or_nothing(
    store: KernelStore, tmp_path: Path, images: Any, interrupts: Callable[[int], None]
) -> None:
    tree = str(images.package(tmp_path / "p", modules={"a.ko": images.module()}))
    interrupted = 0
    for count in range(1000):
        interrupts(count)
        try:
            add_kernel(store, tree)
            break
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            interrupts(-1)
        kernels = store.kernels()
        assert not [name for name in visible(store) if name.startswith(".staging")], count
        assert len(visible(store)) == 2 * len(kernels), count
        assert not store.broken
        for kernel in kernels:
            store.remove(kernel)
    assert interrupted > 30
    assert len(store.kernels()) == 1


def test_ctrl_c_while_a_kernel_is_replaced_keeps_the_old_or_the_new(
    store: KernelStore, tmp_path: Path, images: Any, interrupts: Callable[[int], None]
) -> None:
    tree = images.package(tmp_path / "p", modules={"a.ko": images.module()})
    add_kernel(store, str(tree))
    for count in range(1000):
        interrupts(count)
        try:
            add_kernel(store, str(tree))
            break
        except KeyboardInterrupt:
            continue
        finally:
            interrupts(-1)
            assert len(store.kernels()) == 1, count
            assert len(visible(store)) == 2, count


def test_concurrent_adds_of_one_name_do_not_mix(home: Path, tmp_path: Path, images: Any) -> None:
    import threading

    trees = [str(images.package(tmp_path / f"p{number}", padding=16 * number)) for number in range(4)]
    errors: list[Exception] = []

    def work(tree: str) -> None:
        try:
            add_kernel(KernelStore(), tree, name="same")
        except ConfigError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(tree,)) for tree in trees]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = KernelStore()
    assert len(errors) == 3
    assert [kernel.names for kernel in store.kernels()] == [("same",)]
    assert len(visible(store)) == 2


def test_concurrent_adds_of_one_kernel_all_succeed(home: Path, tmp_path: Path, images: Any) -> None:
    import threading

    tree, found = str(images.package(tmp_path / "p")), []
    threads = [threading.Thread(target=lambda: found.append(add_kernel(KernelStore(), tree))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({kernel.digest for kernel in found}) == 1
    assert len(found) == 4
    assert len(visible(KernelStore())) == 2
