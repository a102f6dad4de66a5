#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"

static int load(const char *file, const char *parameters)
{
    int fd = open(file, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return errno;
    long result = syscall(SYS_finit_module, fd, parameters, 0);
    int error = result == 0 || errno == EEXIST ? 0 : errno;

    close(fd);
    return error;
}

static void note(struct module_errors *errors, const char *file, int error)
{
    log_line("module %s: %s", file, strerror(error));
    if (errors->count < MODULE_ERRORS_MAX)
        snprintf(errors->text[errors->count], MODULE_ERROR_SIZE, "%d %.100s", error, file);
    errors->count++;
}

/* Load each module named in (list), in order: "path [parameters]" per line. A module that fails does not stop the
 * next: its error goes to the host in HELLO. */
void modules_load(const char *list, struct module_errors *ret)
{
    FILE *stream = fopen(list, "re");
    char line[1024];

    ret->count = 0;
    if (stream == NULL) {
        if (errno != ENOENT)
            note(ret, list, errno);
        return;
    }
    while (fgets(line, sizeof(line), stream) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        char *parameters = strchr(line, ' ');

        if (line[0] == '\0' || line[0] == '#')
            continue;
        if (parameters != NULL)
            *parameters++ = '\0';
        int error = load(line, parameters == NULL ? "" : parameters);

        if (error != 0)
            note(ret, line, error);
    }
    fclose(stream);
}
