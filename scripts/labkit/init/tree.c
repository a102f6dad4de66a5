/* Unpack the run's files: see lab.h. The host's side is cpio.py, which tells the format. */
#define _GNU_SOURCE
#include "lab.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HEADER_SIZE = 110, READ_SIZE = 1 << 20 };

/* Columns of the header. */
enum { MODE = 1, MTIME = 5, FILE_SIZE = 6, NAME_SIZE = 11 };

struct archive {
	int fd;
	size_t offset;
	size_t start;
	size_t fill;
	char buffer[READ_SIZE];
};

/* Copy the next `size` bytes to `into`, or to the file `fd`, or nowhere. */
static void take(struct archive *archive, size_t size, char *into, int fd)
{
	while (size > 0) {
		if (archive->fill == 0) {
			ssize_t got = read(archive->fd, archive->buffer, sizeof(archive->buffer));
			if (got <= 0)
				die("read", "archive");
			archive->start = 0;
			archive->fill = (size_t)got;
		}
		size_t part = archive->fill < size ? archive->fill : size;
		const char *from = archive->buffer + archive->start;
		if (into) {
			memcpy(into, from, part);
			into += part;
		} else if (fd >= 0 && write(fd, from, part) != (ssize_t)part) {
			die("write", "file of the archive");
		}
		archive->start += part;
		archive->fill -= part;
		archive->offset += part;
		size -= part;
	}
}

static void align(struct archive *archive)
{
	take(archive, -archive->offset & 3, NULL, -1);
}

static unsigned long column(const char *header, int index)
{
	char digits[9] = { 0 };

	memcpy(digits, header + 6 + 8 * index, 8);
	return strtoul(digits, NULL, 16);
}

static void unpack_entry(struct archive *archive, const char *path, const char *header)
{
	char link[4096];
	mode_t mode = (mode_t)column(header, MODE);
	size_t size = column(header, FILE_SIZE);
	struct timespec times[2] = { { .tv_nsec = UTIME_OMIT },
				     { .tv_sec = (time_t)column(header, MTIME) } };

	if (S_ISDIR(mode)) {
		if (mkdir(path, mode & 07777) < 0 && errno != EEXIST)
			die("make", path);
	} else if (S_ISLNK(mode)) {
		if (size >= sizeof(link))
			size = sizeof(link) - 1;
		take(archive, size, link, -1);
		link[size] = '\0';
		if (symlink(link, path) < 0 && errno != EEXIST)
			die("link", path);
	} else {
		int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, mode & 07777);
		if (fd < 0)
			die("create", path);
		take(archive, size, NULL, fd);
		futimens(fd, times); /* compiled Python is only used if its source is as old as it says */
		close(fd);
	}
	align(archive);
}

void unpack_archive(const char *source, const char *target)
{
	static struct archive archive;
	char header[HEADER_SIZE], name[4096];

	archive.fd = open(source, O_RDONLY | O_CLOEXEC);
	if (archive.fd < 0 || chdir(target) < 0)
		die("open", source);
	umask(0);
	for (;;) {
		take(&archive, HEADER_SIZE, header, -1);
		size_t size = column(header, NAME_SIZE);
		if (memcmp(header, "070701", 6) != 0 || size > sizeof(name)) {
			errno = EPROTO;
			die("read", source);
		}
		take(&archive, size, name, -1);
		align(&archive);
		if (strcmp(name, "TRAILER!!!") == 0)
			break;
		unpack_entry(&archive, name, header);
	}
	umask(022);
	close(archive.fd);
	if (chdir("/") < 0)
		die("leave", target);
}
