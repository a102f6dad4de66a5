"""Root file systems from images: what a command finds in them, and what becomes of what it writes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.command import Command
from support.partitioned import LINUX, ROOT_X86_64, gpt_disk

import kvmlite
from kvmlite.images.busybox import find_busybox
from kvmlite.images.ext4 import make_ext4
from kvmlite.images.image_store import ImageStore
from kvmlite.images.kernels import kernel_at
from kvmlite.images.modules import FEATURES, plan_modules, wanted_modules
from kvmlite.images.root_source import import_image
from kvmlite.images.volumes import VolumeStore

LIMIT_S = 280


@pytest.fixture(scope="module", autouse=True)
def mini(kvmlite_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image ``mini``: busybox, a user joe, a file of his. The tree it is made of."""
    tree = tmp_path_factory.mktemp("mini")
    for directory in ("bin", "etc", "home/joe", "tmp"):
        (tree / directory).mkdir(parents=True)
    shutil.copy(find_busybox(), tree / "bin/busybox")
    for name in ("sh", "cat", "id", "ls", "echo", "stat", "mount", "touch", "rm", "dd", "sync"):
        (tree / "bin" / name).symlink_to("busybox")
    (tree / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\njoe:x:1234:1235::/home/joe:/bin/sh\n")
    (tree / "etc/group").write_text("joe:x:1235:\nextra:x:77:joe\n")
    (tree / "home/joe/letter").write_text("for joe only\n")
    if os.geteuid() == 0:
        for path in (tree / "home/joe", tree / "home/joe/letter"):
            os.chown(path, 1234, 1235)
    (tree / "home/joe/letter").chmod(0o400)
    import_image(ImageStore(), "mini", str(tree))
    return tree


def test_a_debian_image_runs(kvmlite: Command, kernel: Path, debian: str) -> None:
    script = ". /etc/os-release; echo $ID; id -un; dpkg-query -W -f '${Version}\\n' libc6; ip -br addr"
    ended = kvmlite("run", debian, "--kernel", kernel, "--user", "nobody", "--", "sh", "-c", script, timeout_s=LIMIT_S)
    assert (ended.code, ended.stderr) == (0, "")
    lines = ended.stdout.decode().splitlines()
    assert lines[:2] == ["debian", "nobody"]
    assert lines[2].startswith("2.")
    assert lines[3].split()[0] == "lo"


def test_a_command_finds_the_image_and_nothing_of_the_initramfs(kvmlite: Command, kernel: Path) -> None:
    script = (
        "cat /home/joe/letter; id; pwd; ls /dev/null /proc/self/fd/0 /dev/pts/ptmx; ls /sys/block; echo $HOME $GREETING; "
        "ls -d /kvmlite /init"
    )
    options = ("--user", "joe", "--workdir", "/home/joe", "--env", "GREETING=hello")
    ended = kvmlite("run", "mini", "--kernel", kernel, *options, "--", "sh", "-c", script, timeout_s=LIMIT_S)
    lines = ended.stdout.decode().splitlines()
    assert lines[:1] + lines[2:] == [
        "for joe only", "/home/joe", "/dev/null", "/dev/pts/ptmx", "/proc/self/fd/0", "vda", "/home/joe hello",
    ]  # fmt: skip
    assert lines[1].startswith("uid=1234(joe) gid=1235(joe) groups=")
    assert "77(extra)" in lines[1]
    assert "ls: /kvmlite: No such file or directory" in ended.stderr
    assert "ls: /init: No such file or directory" in ended.stderr


def test_what_is_written_is_thrown_away(kernel: Path) -> None:
    script = "dd if=/dev/zero of=/big bs=1M count=64 2>/dev/null && rm /etc/passwd && touch /new && sync && ls /"
    image = ImageStore().find("mini")
    before = os.stat(image.path)
    first = kvmlite.run(script, image="mini", kernel=kernel)
    assert (first.exit_code, first.stderr) == (0, "")
    assert {"big", "new"} <= set(first.stdout.split())
    second = kvmlite.run("ls / /etc", image="mini", kernel=kernel)
    assert "new" not in second.stdout.split()
    assert "passwd" in second.stdout.split()
    after = os.stat(image.path)
    assert (after.st_mtime_ns, after.st_blocks) == (before.st_mtime_ns, before.st_blocks)


def test_what_is_written_is_kept_in_a_volume(kernel: Path) -> None:
    first = kvmlite.run(
        "dd if=/dev/urandom of=/big bs=1M count=24 2>/dev/null; echo 1 > /n", image="mini", keep="mine", kernel=kernel
    )
    assert (first.exit_code, first.stderr) == (0, "")
    assert VolumeStore().find("mine").allocated > 24 << 20
    store = VolumeStore()
    store.create("data", 64 << 20, filesystem="ext4")
    script = "cat /n; stat -c %s /big; mount; echo written > /srv/data/file"
    second = kvmlite.run(script, image="mini", keep="mine", volumes={"data": "/srv/data"}, kernel=kernel)
    assert second.stdout.splitlines()[:2] == ["1", str(24 << 20)]
    assert "/dev/vda on / type ext4 (rw" in second.stdout
    third = kvmlite.run("cat /a/file /b/n", volumes={"data": "/a", "mine": "/b"}, kernel=kernel)
    assert (third.exit_code, third.stdout) == (0, "written\n1\n")
    import_image(ImageStore(), "other", "/etc/apt", size=64 << 20)
    with pytest.raises(kvmlite.ConfigError, match="volume mine was not made of image other"):
        kvmlite.run("true", image="other", keep="mine", kernel=kernel)


def test_an_image_as_memory_is_a_root_like_a_disk(kernel: Path) -> None:
    before = os.stat(ImageStore().find("mini").path).st_mtime_ns
    first = kvmlite.run("echo 1 > /new && sync && cat /new && mount", image="mini", dax=True, kernel=kernel)
    assert (first.exit_code, first.stderr) == (0, "")
    assert first.stdout.startswith("1\n")
    assert "/dev/pmem0 on / type ext4 (rw,noatime,dax=always" in first.stdout
    assert os.stat(ImageStore().find("mini").path).st_mtime_ns == before
    kept = kvmlite.run("echo 2 > /kept", image="mini", dax=True, keep="memory", kernel=kernel)
    assert (kept.exit_code, kept.stderr) == (0, "")
    again = kvmlite.run("cat /kept; ls /new", image="mini", keep="memory", kernel=kernel)
    assert again.stdout == "2\n"


@pytest.fixture
def disk(mini: Path, kernel: Path, tmp_path: Path) -> Path:
    """A disk as an installer makes it: a partition of something else, and a root with kernel, modules and GRUB's configuration."""
    found = kernel_at(str(kernel))
    assert found.modules_dir
    modules = mini / "lib/modules" / found.release
    for path in [each.path for each in plan_modules(found.modules_dir, wanted_modules(tuple(FEATURES))).load]:
        target = modules / os.path.relpath(path, found.modules_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for name in ("modules.dep", "modules.builtin", "modules.softdep", "modules.alias"):
        shutil.copyfile(f"{found.modules_dir}/{name}", modules / name)
    (mini / "boot/grub").mkdir(parents=True)
    shutil.copyfile(found.path, mini / f"boot/vmlinuz-{found.release}")
    entry = f"menuentry 'x' {{\n\tlinux /boot/vmlinuz-{found.release} root=UUID=1 ro quiet audit=0 kvmlite.test=1\n}}\n"
    (mini / "boot/grub/grub.cfg").write_text(entry)
    make_ext4(str(mini), str(tmp_path / "root.ext4"), size=None)
    (tmp_path / "first").write_bytes(bytes(1 << 20))
    return gpt_disk(tmp_path / "disk.img", [(LINUX, tmp_path / "first"), (ROOT_X86_64, tmp_path / "root.ext4")])


def test_a_disk_boots_the_kernel_it_holds(kvmlite: Command, kernel: Path, disk: Path) -> None:
    script = "cat /proc/cmdline; cat /proc/sys/kernel/osrelease; mount; cat /home/joe/letter"
    ended = kvmlite("run", disk, "--kernel", "image", "--", "sh", "-c", script, timeout_s=LIMIT_S)
    assert (ended.code, ended.stderr) == (0, "")
    lines = ended.stdout.decode().splitlines()
    assert lines[0].endswith(" audit=0 kvmlite.test=1")
    assert lines[1] == kernel_at(str(kernel)).release
    assert any(line.startswith("/dev/vda2 on / type ext4 (rw") for line in lines)
    assert lines[-1] == "for joe only"
