#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent.h"

void conf_defaults(struct conf *conf)
{
    *conf = (struct conf){
        .hostname = "kvmlite",
        .path = DEFAULT_PATH,
        .channel = CHANNEL_AUTO,
        .vsock_port = 1024,
        .channel_wait_ms = 500,
        .loss_grace_ms = 5000,
    };
}

static bool set_text(char *field, size_t size, const char *value)
{
    size_t length = strlen(value);

    if (length == 0 || length >= size)
        return false;
    memcpy(field, value, length + 1);
    return true;
}

static bool set_number(uint32_t *field, const char *value)
{
    char *end;

    errno = 0;
    unsigned long number = strtoul(value, &end, 10);

    if (errno != 0 || end == value || *end != '\0' || number > UINT32_MAX)
        return false;
    *field = (uint32_t)number;
    return true;
}

static bool set_channel(enum channel_kind *field, const char *value)
{
    static const char *const names[] = {
        [CHANNEL_AUTO] = "auto", [CHANNEL_VSOCK] = "vsock", [CHANNEL_CONSOLE] = "console", [CHANNEL_SERIAL] = "serial",
    };

    for (unsigned int kind = 0; kind < sizeof(names) / sizeof(names[0]); kind++) {
        if (strcmp(value, names[kind]) == 0) {
            *field = (enum channel_kind)kind;
            return true;
        }
    }
    return false;
}

static bool set_key(struct conf *conf, const char *key, const char *value)
{
    if (strcmp(key, "hostname") == 0)
        return set_text(conf->hostname, sizeof(conf->hostname), value);
    if (strcmp(key, "path") == 0)
        return set_text(conf->path, sizeof(conf->path), value);
    if (strcmp(key, "channel") == 0)
        return set_channel(&conf->channel, value);
    if (strcmp(key, "vsock_port") == 0)
        return set_number(&conf->vsock_port, value);
    if (strcmp(key, "channel_wait_ms") == 0)
        return set_number(&conf->channel_wait_ms, value);
    if (strcmp(key, "loss_grace_ms") == 0)
        return set_number(&conf->loss_grace_ms, value);
    return false;
}

void conf_read(struct conf *conf, const char *file)
{
    FILE *stream = fopen(file, "re");
    char line[512];

    if (stream == NULL) {
        if (errno != ENOENT)
            log_line("%s: %s", file, strerror(errno));
        return; /* an initramfs without one gets the defaults */
    }
    while (fgets(line, sizeof(line), stream) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        if (line[0] == '\0' || line[0] == '#')
            continue;
        char *separator = strchr(line, '=');

        if (separator != NULL)
            *separator = '\0';
        if (separator == NULL || !set_key(conf, line, separator + 1))
            log_line("%s: cannot use '%s'", file, line);
    }
    fclose(stream);
}
