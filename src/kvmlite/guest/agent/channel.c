#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "agent.h"

#define CONSOLE_PORT_NAME "org.kvmlite.agent.0"
#define CONSOLE_PORTS "/sys/class/virtio-ports"
#define SERIAL_DEVICE "/dev/ttyS1"

enum {
    BREAK_STALL_MS = 1000, /* a host that takes nothing for so long is gone */
};

static int make_nonblocking(int fd)
{
    if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) == 0)
        return fd;
    close(fd);
    return -1;
}

static int open_vsock(uint32_t port)
{
    static bool is_missing; /* asking again would make the kernel run modprobe each time */
    struct sockaddr_vm host = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port};
    int fd = is_missing ? -1 : socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

    if (fd < 0) {
        is_missing = true;
        errno = EAFNOSUPPORT;
        return -1;
    }
    if (connect(fd, (struct sockaddr *)&host, sizeof(host)) == 0)
        return make_nonblocking(fd);
    int error = errno;

    close(fd);
    errno = error;
    return -1;
}

/* First line of /sys/class/virtio-ports/(port)/(attribute), without its newline. */
static bool read_port_attribute(const char *port, const char *attribute, char *ret, int size)
{
    char file[320];

    snprintf(file, sizeof(file), CONSOLE_PORTS "/%s/%s", port, attribute);
    FILE *stream = fopen(file, "re");

    if (stream == NULL)
        return false;
    bool found = fgets(ret, size, stream) != NULL;

    fclose(stream);
    if (found)
        ret[strcspn(ret, "\n")] = '\0';
    return found;
}

static int open_port(const char *port)
{
    char file[300], numbers[32];
    unsigned int major_number, minor_number;

    snprintf(file, sizeof(file), "/dev/%s", port);
    int fd = open(file, O_RDWR | O_CLOEXEC | O_NONBLOCK);

    if (fd >= 0 || errno != ENOENT)
        return fd;
    /* no devtmpfs: make the node */
    if (!read_port_attribute(port, "dev", numbers, sizeof(numbers)) ||
        sscanf(numbers, "%u:%u", &major_number, &minor_number) != 2 ||
        mknod(file, S_IFCHR | 0600, makedev(major_number, minor_number)) != 0)
        return -1;
    return open(file, O_RDWR | O_CLOEXEC | O_NONBLOCK);
}

static int open_console(void)
{
    DIR *ports = opendir(CONSOLE_PORTS);
    struct dirent *entry;
    char name[64];
    int fd = -1, error = ENODEV;

    if (ports == NULL) {
        errno = ENODEV;
        return -1;
    }
    while (fd < 0 && (entry = readdir(ports)) != NULL) {
        if (entry->d_name[0] == '.' || !read_port_attribute(entry->d_name, "name", name, sizeof(name)) ||
            strcmp(name, CONSOLE_PORT_NAME) != 0)
            continue;
        fd = open_port(entry->d_name);
        error = errno;
    }
    closedir(ports);
    errno = error;
    return fd;
}

static int open_serial(void)
{
    struct termios settings;
    int fd = open(SERIAL_DEVICE, O_RDWR | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);

    if (fd < 0)
        return -1;
    if (tcgetattr(fd, &settings) != 0) { /* EIO: a node without a UART behind it */
        close(fd);
        errno = ENODEV;
        return -1;
    }
    cfmakeraw(&settings);
    settings.c_cflag |= CLOCAL | CREAD;
    cfsetspeed(&settings, B115200);
    if (tcsetattr(fd, TCSANOW, &settings) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

/* A serial line has no end of file, and not every VMM passes on that a console port was closed. After the serving
 * process has died, fill up whatever frame it was in and go on with bytes that are no header, so that the host sees a
 * broken channel and not silence. */
void channel_break(enum channel_kind kind)
{
    static char noise[4096];
    int fd = kind == CHANNEL_SERIAL ? open_serial() : kind == CHANNEL_CONSOLE ? open_console() : -1;

    if (fd < 0)
        return; /* a vsock connection has ended with its process */
    memset(noise, 0xff, sizeof(noise));
    for (size_t sent = 0; sent < PROTOCOL_PAYLOAD_MAX + sizeof(noise);) {
        struct pollfd room = {.fd = fd, .events = POLLOUT};
        ssize_t count = poll(&room, 1, BREAK_STALL_MS) > 0 ? write(fd, noise, sizeof(noise)) : 0;

        if (count <= 0)
            break;
        sent += (size_t)count;
    }
    close(fd);
}

static int try_once(const struct conf *conf, bool is_last, enum channel_kind *ret_kind)
{
    bool any = conf->channel == CHANNEL_AUTO;
    int fd = -1;

    if (any || conf->channel == CHANNEL_VSOCK) {
        *ret_kind = CHANNEL_VSOCK;
        fd = open_vsock(conf->vsock_port);
    }
    if (fd < 0 && (any || conf->channel == CHANNEL_CONSOLE)) {
        *ret_kind = CHANNEL_CONSOLE;
        fd = open_console();
    }
    /* a UART is nearly always there: in auto mode it is what remains when the others do not come */
    if (fd < 0 && ((any && is_last) || conf->channel == CHANNEL_SERIAL)) {
        *ret_kind = CHANNEL_SERIAL;
        fd = open_serial();
    }
    return fd;
}

int channel_open(const struct conf *conf, enum channel_kind *ret_kind)
{
    uint64_t deadline = clock_monotonic_ns() + (uint64_t)conf->channel_wait_ms * NS_PER_MS;

    for (;;) {
        bool is_last = clock_monotonic_ns() >= deadline;
        int fd = try_once(conf, is_last, ret_kind);

        if (fd >= 0 || is_last)
            return fd;
        nanosleep(&(struct timespec){.tv_nsec = NS_PER_MS}, NULL);
    }
}
