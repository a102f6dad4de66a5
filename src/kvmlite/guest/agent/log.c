#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

static int log_fd = STDERR_FILENO;
static const char *log_prefix = "";

void log_open(bool to_kernel)
{
    if (!to_kernel)
        return;
    int fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC);

    if (fd < 0)
        return;
    log_fd = fd;
    log_prefix = "<4>"; /* KERN_WARNING */
}

void log_line(const char *format, ...)
{
    char line[512];
    int saved = errno;
    int head = snprintf(line, sizeof(line), "%skvmlite-agent: ", log_prefix);
    va_list arguments;

    va_start(arguments, format);
    int body = vsnprintf(line + head, sizeof(line) - (size_t)head - 1, format, arguments);
    va_end(arguments);
    size_t size = (size_t)head + (body > 0 ? (size_t)body : 0);

    if (size > sizeof(line) - 2)
        size = sizeof(line) - 2;
    line[size++] = '\n';
    if (write(log_fd, line, size) < 0)
        log_fd = STDERR_FILENO; /* nowhere better to complain */
    errno = saved;
}

uint64_t clock_monotonic_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}
