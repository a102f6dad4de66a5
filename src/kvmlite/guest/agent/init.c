#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

#define CONF_FILE "/kvmlite/agent.conf"
#define MODULE_LIST "/kvmlite/modules"

/* Mount where nothing is mounted yet; 0 or an errno, which is logged. */
int mount_at(const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
    mkdir(target, 0755);
    if (mount(source, target, type, flags, data) == 0 || errno == EBUSY)
        return 0;
    int error = errno;

    log_line("mount %s at %s: %s", type, target, strerror(error));
    return error;
}

/* What loading modules and opening the channel need, and fds 0-2, which the kernel leaves closed without a console. */
static void mount_first(void)
{
    umask(0);
    mount_at("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
    int null = open("/dev/null", O_RDWR);

    for (int fd = 0; null >= 0 && fd < 3; fd++)
        dup2(null, fd);
    if (null > 2)
        close(null);
    log_open(true);
    mount_at("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_at("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
}

static void link_at(const char *target, const char *path)
{
    if (symlink(target, path) != 0 && errno != EEXIST)
        log_line("symlink %s: %s", path, strerror(errno));
}

static void raise_loopback(void)
{
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

    if (fd < 0)
        return; /* a kernel without IPv4 */
    if (ioctl(fd, SIOCSIFFLAGS, &request) != 0)
        log_line("lo up: %s", strerror(errno));
    close(fd);
}

static void protect_from_oom_killer(void)
{
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

    if (fd < 0 || write(fd, "-1000", 5) < 0)
        log_line("oom_score_adj: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
}

void system_finish(const struct conf *conf)
{
    protect_from_oom_killer();
    mkdir("/tmp", 01777);
    chmod("/tmp", 01777);
    mkdir("/run", 0755);
    mkdir("/root", 0700);
    mount_at("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=620,ptmxmode=666,gid=5");
    mkdir("/dev/shm", 01777);
    mount_at("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    link_at("/proc/self/fd", "/dev/fd");
    link_at("/proc/self/fd/0", "/dev/stdin");
    link_at("/proc/self/fd/1", "/dev/stdout");
    link_at("/proc/self/fd/2", "/dev/stderr");
    if (sethostname(conf->hostname, strlen(conf->hostname)) != 0)
        log_line("sethostname: %s", strerror(errno));
    raise_loopback();
}

/* The serving process: 0 if the channel came up and ended, in which case it has powered off. */
static int serve(const struct conf *conf, const struct module_errors *errors, uint64_t start_ns, enum channel_kind *ret_kind)
{
    struct serve_options options = {
        .conf = conf, .module_errors = errors, .start_ns = start_ns, .is_system = true,
    };
    int fd = channel_open(conf, &options.kind);

    *ret_kind = options.kind;
    if (fd < 0) {
        log_line("no channel to the host: %s", strerror(errno));
        return 1;
    }
    return serve_run(fd, &options);
}

/* Reap until the serving process dies. It has no way to end but by its own shutdown, so if it does the host has lost
 * it: leave the machine up for a moment, so that the host sees a lost channel before it sees a machine that is off. */
static void supervise(pid_t server, const struct conf *conf, const enum channel_kind *kind)
{
    int status = 0;
    pid_t pid;

    while ((pid = wait(&status)) != server) {
        if (pid < 0 && errno != EINTR)
            break;
    }
    log_line("serving process ended with status %#x", (unsigned int)status);
    channel_break(*kind);
    struct timespec grace = {
        .tv_sec = conf->loss_grace_ms / 1000, .tv_nsec = (long)(conf->loss_grace_ms % 1000) * NS_PER_MS,
    };

    nanosleep(&grace, NULL);
    control_shutdown(RB_POWER_OFF, false);
}

int init_run(uint64_t start_ns)
{
    static struct conf conf;
    static struct module_errors errors;

    int root_error = root_prepare();

    mount_first();
    if (root_error != 0)
        log_line("bind /: %s", strerror(root_error));
    conf_defaults(&conf);
    conf_read(&conf, CONF_FILE);
    modules_load(MODULE_LIST, &errors);
    reboot(RB_DISABLE_CAD);
    enum channel_kind *kind = mmap(NULL, sizeof(*kind), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (kind == MAP_FAILED) {
        log_line("mmap: %s", strerror(errno));
        return 1;
    }
    pid_t server = fork();

    if (server == 0)
        _exit(serve(&conf, &errors, start_ns, kind));
    if (server < 0) {
        log_line("fork: %s", strerror(errno));
        return 1;
    }
    supervise(server, &conf, kind);
    return 0;
}
