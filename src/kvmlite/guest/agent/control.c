#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/random.h>

#include "agent.h"

#ifndef RNDRESEEDCRNG
#define RNDRESEEDCRNG _IO('R', 0x07)
#endif

enum {
    ENTROPY_MAX = 512,    /* bytes the kernel mixes in at once without trouble */
    TERM_STEPS = 100,     /* times 10 ms for commands to end after SIGTERM */
};

/* Payload: le64 nanoseconds since 1970. */
int control_set_clock(const struct frame *frame)
{
    uint64_t now;

    if (frame->size != sizeof(now))
        return EBADMSG;
    memcpy(&now, frame->payload, sizeof(now));
    now = le64toh(now);
    struct timespec time = {.tv_sec = (time_t)(now / NS_PER_S), .tv_nsec = (long)(now % NS_PER_S)};

    return clock_settime(CLOCK_REALTIME, &time) == 0 ? 0 : errno;
}

/* Payload: random bytes, all credited as entropy; the generator is reseeded from them before this returns. */
int control_add_entropy(const struct frame *frame)
{
    union {
        struct rand_pool_info info;
        uint8_t space[sizeof(struct rand_pool_info) + ENTROPY_MAX];
    } pool = {0};
    int error = 0;

    if (frame->size == 0 || frame->size > ENTROPY_MAX)
        return EBADMSG;
    int fd = open("/dev/urandom", O_WRONLY | O_CLOEXEC);

    if (fd < 0)
        return errno;
    pool.info.entropy_count = (int)frame->size * 8;
    pool.info.buf_size = (int)frame->size;
    memcpy(pool.space + sizeof(pool.info), frame->payload, frame->size);
    if (ioctl(fd, RNDADDENTROPY, &pool) != 0 || ioctl(fd, RNDRESEEDCRNG) != 0)
        error = errno;
    close(fd);
    return error;
}

/* Make (path) and the directories above it. */
static int make_directories(const char *path)
{
    char *copy = strdup(path);
    int error = 0;

    if (copy == NULL)
        return ENOMEM;
    for (char *slash = copy + 1; error == 0 && *slash != '\0'; slash++) {
        if (*slash != '/')
            continue;
        *slash = '\0';
        error = mkdir(copy, 0755) == 0 || errno == EEXIST ? 0 : errno;
        *slash = '/';
    }
    if (error == 0)
        error = mkdir(copy, 0755) == 0 || errno == EEXIST ? 0 : errno;
    free(copy);
    return error;
}

/* A source may name a disk by what the host knows of it. */
static int find_source(const char **source, char path[DISK_PATH_SIZE])
{
    if (!disk_is_named(*source))
        return 0;
    int error = disk_find(*source, path);

    *source = path;
    return error;
}

/* Payload: le32 mount(2) flags, then NUL-terminated source, target, type, data. */
int control_mount(const struct frame *frame)
{
    const char *fields[4], *cursor = (const char *)frame->payload + sizeof(uint32_t);
    const char *end = (const char *)frame->payload + frame->size;
    uint32_t flags;

    if (frame->size < sizeof(flags))
        return EBADMSG;
    memcpy(&flags, frame->payload, sizeof(flags));
    for (int index = 0; index < 4; index++) {
        const char *stop = memchr(cursor, '\0', (size_t)(end - cursor));

        if (stop == NULL)
            return EBADMSG;
        fields[index] = cursor;
        cursor = stop + 1;
    }
    if (cursor != end || fields[1][0] != '/')
        return EBADMSG;
    char path[DISK_PATH_SIZE];
    int error = find_source(&fields[0], path);

    if (error == 0)
        error = make_directories(fields[1]);
    if (error != 0)
        return error;
    return mount(fields[0], fields[1], fields[2], le32toh(flags), fields[3]) == 0 ? 0 : errno;
}

/* The only payload of ROOT and MKDIR: an absolute path, NUL-terminated; NULL if it is not that. */
static const char *path_of(const struct frame *frame)
{
    const char *path = (const char *)frame->payload;
    bool is_path = frame->size >= 2 && path[0] == '/' && memchr(path, '\0', frame->size) == path + frame->size - 1;

    return is_path ? path : NULL;
}

int control_root(const struct frame *frame, bool is_system)
{
    const char *directory = path_of(frame);

    if (directory == NULL)
        return EBADMSG;
    return is_system ? root_change(directory) : EPERM;
}

int control_mkdir(const struct frame *frame)
{
    const char *directory = path_of(frame);

    return directory != NULL ? make_directories(directory) : EBADMSG;
}

/* No payload. */
int control_sync(const struct frame *frame)
{
    if (frame->size != 0)
        return EBADMSG;
    sync();
    return 0;
}

/* Payload: see network.c. */
int control_network(const struct frame *frame, bool is_system)
{
    return is_system ? network_configure(frame->payload, frame->size) : EPERM;
}

/* Payload: le32 enum shutdown_kind. */
int control_shutdown_kind(const struct frame *frame, int *ret_command)
{
    static const int commands[] = {
        [SHUTDOWN_POWEROFF] = RB_POWER_OFF, [SHUTDOWN_REBOOT] = RB_AUTOBOOT, [SHUTDOWN_HALT] = (int)RB_HALT_SYSTEM,
    };
    uint32_t kind;

    if (frame->size != sizeof(kind))
        return EBADMSG;
    memcpy(&kind, frame->payload, sizeof(kind));
    kind = le32toh(kind);
    if (kind >= sizeof(commands) / sizeof(commands[0]))
        return EINVAL;
    *ret_command = commands[kind];
    return 0;
}

/* End the machine: commands that are running get SIGTERM and a second, then everything is killed. */
void control_shutdown(int command, bool anyone_running)
{
    if (anyone_running) {
        kill(-1, SIGTERM);
        kill(-1, SIGCONT);
        for (int step = 0; step < TERM_STEPS && waitpid(-1, NULL, WNOHANG) >= 0; step++)
            nanosleep(&(struct timespec){.tv_nsec = 10 * NS_PER_MS}, NULL);
    }
    kill(-1, SIGKILL);
    sync();
    reboot(command);
    log_line("reboot(%#x): %s", (unsigned int)command, strerror(errno));
    _exit(1);
}
