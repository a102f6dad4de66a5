/* Set up what one run asks for: clock, disks, files, environment. See lab.h. */
#define _GNU_SOURCE
#include "lab.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/random.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

void make_directories(const char *path)
{
	char copy[4096];

	snprintf(copy, sizeof(copy), "%s", path);
	for (char *slash = copy + 1; *slash; slash++) {
		if (*slash != '/')
			continue;
		*slash = '\0';
		mkdir(copy, 0755);
		*slash = '/';
	}
	mkdir(copy, 0755);
}

void must_mount(const char *source, const char *target, const char *type,
		       unsigned long flags, const char *options)
{
	make_directories(target);
	if (mount(source, target, type, flags, options) < 0)
		die("mount", target);
}

static void mount_disk(const char *serial, const char *target, bool read_only)
{
	char path[300];

	find_disk(path, sizeof(path), serial);
	/* what was read of it when the machine was saved was not this run's disk */
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0 || ioctl(fd, BLKFLSBUF, 0) < 0)
		die("flush", path);
	close(fd);
	must_mount(path, target, "ext4", MS_NOATIME | (read_only ? MS_RDONLY : 0), NULL);
}

static void set_clock(const char *text)
{
	long long seconds, nanoseconds;

	if (sscanf(text, "%lld %lld", &seconds, &nanoseconds) == 2) {
		struct timespec now = { .tv_sec = seconds, .tv_nsec = nanoseconds };
		clock_settime(CLOCK_REALTIME, &now);
	}
}

/* Machines resumed from one state would otherwise all draw the same random numbers. */
static void add_entropy(const char *text)
{
	struct {
		struct rand_pool_info info;
		char bytes[128];
	} pool = { .info = { .entropy_count = 512, .buf_size = 128 } };
	int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);

	strncpy(pool.bytes, text, sizeof(pool.bytes));
	if (fd < 0 || ioctl(fd, RNDADDENTROPY, &pool) < 0 || ioctl(fd, RNDRESEEDCRNG, 0) < 0)
		die("reseed", "/dev/urandom");
	close(fd);
}

/* A directory or a file; the place to bind it to is made if need be. */
static void bind_path(const char *source, const char *target)
{
	struct stat info;

	make_directories(target);
	if (stat(source, &info) < 0)
		die("find", source);
	if (!S_ISDIR(info.st_mode) && rmdir(target) == 0)
		close(open(target, O_WRONLY | O_CREAT | O_CLOEXEC, 0644));
	if (mount(source, target, NULL, MS_BIND, NULL) < 0)
		die("bind", target);
}

static void take_item(struct session *session, char *item)
{
	char path[4096];
	char *rest = item + 1;

	switch (item[0]) {
	case 'c':
		set_clock(rest);
		break;
	case 'r':
		add_entropy(rest);
		break;
	case 'u':
		find_disk(path, sizeof(path), rest);
		unpack_archive(path, "/run/lab");
		break;
	case 'm': {
		bool read_only = strncmp(rest, "ro ", 3) == 0;
		char *serial = rest + 3;
		char *target = strchr(serial, ' ');
		*target++ = '\0';
		mount_disk(serial, target, read_only);
		break;
	}
	case 'b':
		snprintf(path, sizeof(path), "/run/lab%s", rest);
		bind_path(path, rest);
		break;
	case 'l': {
		char *link = strchr(rest, ' ');
		*link++ = '\0';
		make_directories(link);
		if (rmdir(link) < 0 || symlink(rest, link) < 0)
			die("link", link);
		break;
	}
	case 'e':
		if (session->environment_count < WORDS_MAX - 1)
			session->environment[session->environment_count++] = rest;
		break;
	case 'a':
		if (session->word_count < WORDS_MAX - 1)
			session->words[session->word_count++] = rest;
		break;
	case 'd':
		session->directory = rest;
		break;
	case 'o':
		session->out = rest;
		break;
	case 't':
		session->has_terminal = true;
		sscanf(rest, "%hu %hu", &session->window.ws_row, &session->window.ws_col);
		break;
	default:
		errno = EINVAL;
		die("session item", item);
	}
}

void read_session(struct session *session)
{
	unsigned char header[5];
	uint32_t size;

	read_exact(control_port, header, sizeof(header));
	memcpy(&size, header + 1, sizeof(size));
	char *payload = malloc(size + 1U);
	if (header[0] != 'S' || !payload) {
		errno = EPROTO;
		die("read", "session");
	}
	read_exact(control_port, payload, size);
	payload[size] = '\0';
	if (mount(NULL, "/", NULL, MS_REMOUNT | MS_NOATIME, NULL) < 0)
		die("remount", "/");
	for (char *item = payload; item < payload + size; ) {
		char *next = item + strlen(item) + 1;
		take_item(session, item);
		item = next;
	}
	if (session->out)
		make_directories(session->out);
}
