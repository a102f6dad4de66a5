#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

enum {
    SERIAL_MAX = 20, /* VIRTIO_BLK_ID_BYTES */
    NAME_SIZE = 64,
};

/* What tells the disk from all others, by the first word of its source. */
typedef bool disk_test(const char *block, const char *name);

/* Whether block device (block) has this serial. A serial of full length has no newline behind it in older kernels. */
static bool has_serial(const char *block, const char *serial)
{
    char path[300], text[SERIAL_MAX + 2] = "";

    snprintf(path, sizeof(path), "/sys/block/%s/serial", block);
    int fd = open(path, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return false; /* not a kind of device that has one */
    ssize_t count = read(fd, text, sizeof(text) - 1);

    close(fd);
    text[count > 0 ? (size_t)count : 0] = '\0';
    text[strcspn(text, "\n")] = '\0';
    return strcmp(text, serial) == 0;
}

/* The device whose registers are at an address: its line in /proc/iomem is "d0003000-d0003fff : LNRO0005:03". */
static bool find_device(uint64_t address, char ret[NAME_SIZE])
{
    FILE *file = fopen("/proc/iomem", "re");
    char line[256];
    bool is_found = false;

    while (file != NULL && !is_found && fgets(line, sizeof(line), file) != NULL) {
        uint64_t first;

        is_found = sscanf(line, " %" SCNx64 "-%*x : %63s", &first, ret) == 2 && first == address;
    }
    if (file != NULL)
        fclose(file);
    return is_found;
}

/* Whether block device (block) is the one behind registers at (address): "../devices/platform/LNRO0005:03/virtio3/...". */
static bool is_behind(const char *block, const char *address)
{
    char path[300], target[512], device[NAME_SIZE], part[NAME_SIZE + 2];
    uint64_t gpa;

    if (sscanf(address, "%" SCNx64, &gpa) != 1 || !find_device(gpa, device))
        return false;
    snprintf(path, sizeof(path), "/sys/block/%s", block);
    ssize_t size = readlink(path, target, sizeof(target) - 1);

    if (size < 0)
        return false;
    target[size] = '\0';
    snprintf(part, sizeof(part), "/%s/", device);
    return strstr(target, part) != NULL;
}

static disk_test *kind_of(const char **source)
{
    static const struct {
        const char *word;
        disk_test *is_it;
    } kinds[] = {{"serial:", has_serial}, {"mmio:", is_behind}};

    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        size_t length = strlen(kinds[i].word);

        if (strncmp(*source, kinds[i].word, length) == 0) {
            *source += length;
            return kinds[i].is_it;
        }
    }
    return NULL;
}

bool disk_is_named(const char *source)
{
    return kind_of(&source) != NULL;
}

int disk_find(const char *source, char ret[DISK_PATH_SIZE])
{
    disk_test *is_it = kind_of(&source);
    const char *partition = strchrnul(source, ':');
    size_t name_size = (size_t)(partition - source);
    char name[SERIAL_MAX + 1] = "";

    if (is_it == NULL || name_size == 0 || name_size > SERIAL_MAX)
        return EINVAL;
    memcpy(name, source, name_size);
    if (*partition != '\0' && (*++partition == '\0' || partition[strspn(partition, "0123456789")] != '\0'))
        return EINVAL;
    DIR *directory = opendir("/sys/block");
    struct dirent *entry;
    int error = ENODEV;

    if (directory == NULL)
        return errno;
    while (error == ENODEV && (entry = readdir(directory)) != NULL) {
        if (entry->d_name[0] == '.' || !is_it(entry->d_name, name))
            continue;
        int length = snprintf(ret, DISK_PATH_SIZE, "/dev/%s%s", entry->d_name, partition);

        error = length > 0 && length < DISK_PATH_SIZE ? 0 : EINVAL;
    }
    closedir(directory);
    return error;
}
