#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"

/* pivot_root(2) does not take the kernel's own rootfs for the old root. Bound over itself it is a mount like any other, so
 * that root_change can be asked for later; pivot_root then moves every process that has the old root, PID 1 too. */
int root_prepare(void)
{
    mkdir("/mnt", 0755);
    if (mount("/", "/mnt", NULL, MS_BIND, NULL) != 0 || chdir("/mnt") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 ||
        chroot(".") != 0 || chdir("/") != 0)
        return errno;
    return 0;
}

/* The mounts that go along. The directories are made before anything is moved: a file system that is read-only and lacks
 * one of them is refused, and nothing has changed. */
static const char *const moved[] = {"dev", "proc", "sys"};
enum { MOVED_COUNT = sizeof(moved) / sizeof(moved[0]) };

static int make_targets(void)
{
    for (int index = 0; index < MOVED_COUNT; index++) {
        struct stat found;

        if (mkdir(moved[index], 0755) != 0 && errno != EEXIST)
            return errno;
        if (fstatat(AT_FDCWD, moved[index], &found, AT_SYMLINK_NOFOLLOW) != 0)
            return errno;
        if (!S_ISDIR(found.st_mode))
            return ENOTDIR;
    }
    return 0;
}

/* With the old root as working directory: its mounts go into the new one, and it goes away. */
static int leave_old_root(void)
{
    for (int index = 0; index < MOVED_COUNT; index++) {
        char target[16];

        snprintf(target, sizeof(target), "/%s", moved[index]);
        if (mount(moved[index], target, NULL, MS_MOVE, NULL) != 0)
            return errno;
    }
    return umount2(".", MNT_DETACH) == 0 ? 0 : errno;
}

int root_change(const char *directory)
{
    int old = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);

    if (old < 0)
        return errno;
    int error = chdir(directory) == 0 ? make_targets() : errno;

    if (error == 0 && syscall(SYS_pivot_root, ".", ".") != 0)
        error = errno;
    if (error == 0)
        error = fchdir(old) == 0 ? leave_old_root() : errno;
    close(old);
    if (chdir("/") != 0 && error == 0)
        error = errno;
    return error;
}
