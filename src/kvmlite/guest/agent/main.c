#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

/* Serve on an inherited fd as an ordinary process: no mounts, no shutdown. Used by the tests. */
static int serve_fd(const char *number, uint64_t start_ns)
{
    static struct conf conf;
    static struct module_errors errors;
    struct serve_options options = {
        .conf = &conf, .module_errors = &errors, .kind = CHANNEL_FD, .start_ns = start_ns,
    };
    int fd = atoi(number);

    log_open(false);
    conf_defaults(&conf);
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0 || fcntl(fd, F_SETFL, O_NONBLOCK) != 0) {
        perror("kvmlite-agent: --fd");
        return 1;
    }
    return serve_run(fd, &options);
}

int main(int argc, char **argv)
{
    uint64_t start_ns = clock_monotonic_ns();

    if (argc == 3 && strcmp(argv[1], "--fd") == 0)
        return serve_fd(argv[2], start_ns);
    if (getpid() == 1)
        return init_run(start_ns);
    fprintf(stderr, "usage: kvmlite-agent --fd N   (or as PID 1 of an initramfs, without arguments)\n");
    return 2;
}
