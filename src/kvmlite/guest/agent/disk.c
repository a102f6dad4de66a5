#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

enum { SERIAL_MAX = 20 }; /* VIRTIO_BLK_ID_BYTES */

/* Whether block device (name) has this serial. A serial of full length has no newline behind it in older kernels. */
static bool has_serial(const char *name, const char *serial)
{
    char path[300], text[SERIAL_MAX + 2] = "";

    snprintf(path, sizeof(path), "/sys/block/%s/serial", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return false; /* not a kind of device that has one */
    ssize_t count = read(fd, text, sizeof(text) - 1);

    close(fd);
    text[count > 0 ? (size_t)count : 0] = '\0';
    text[strcspn(text, "\n")] = '\0';
    return strcmp(text, serial) == 0;
}

int disk_find(const char *name, char ret[DISK_PATH_SIZE])
{
    const char *partition = strchrnul(name, ':');
    size_t length_wanted = (size_t)(partition - name);
    char serial[SERIAL_MAX + 1] = "";

    if (length_wanted == 0 || length_wanted > SERIAL_MAX)
        return EINVAL;
    memcpy(serial, name, length_wanted);
    if (*partition != '\0' && (*++partition == '\0' || partition[strspn(partition, "0123456789")] != '\0'))
        return EINVAL;
    DIR *directory = opendir("/sys/block");
    struct dirent *entry;
    int error = ENODEV;

    if (directory == NULL)
        return errno;
    while (error == ENODEV && (entry = readdir(directory)) != NULL) {
        if (!has_serial(entry->d_name, serial))
            continue;
        int length = snprintf(ret, DISK_PATH_SIZE, "/dev/%s%s", entry->d_name, partition);

        error = length > 0 && length < DISK_PATH_SIZE ? 0 : EINVAL;
    }
    closedir(directory);
    return error;
}
