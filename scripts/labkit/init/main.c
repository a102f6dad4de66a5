/* Start the machine up to the point where it waits for a session: see lab.h. */
#define _GNU_SOURCE
#include "lab.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

int control_port = -1;

void say(const char *format, ...)
{
	char line[1024];
	va_list args;

	va_start(args, format);
	int size = vsnprintf(line, sizeof(line), format, args);
	va_end(args);
	if (size >= (int)sizeof(line))
		size = sizeof(line) - 1;
	for (int sent = 0; control_port >= 0 && sent < size; ) {
		ssize_t part = write(control_port, line + sent, (size_t)(size - sent));
		if (part > 0)
			sent += part;
		else if (part < 0 && errno != EAGAIN && errno != EINTR)
			return;
		else
			poll(&(struct pollfd){ .fd = control_port, .events = POLLOUT }, 1, 1000);
	}
}

/* The host ends the machine when it has read this; without a host, leave through a panic. */
void die(const char *what, const char *object)
{
	const char *reason = strerror(errno);

	fprintf(stderr, "lab: %s %s: %s\n", what, object, reason);
	say("fail %s %s: %s\n", what, object, reason);
	sleep(control_port >= 0 ? 5 : 0);
	exit(1);
}

void read_exact(int fd, void *into, size_t size)
{
	char *at = into;

	while (size > 0) {
		ssize_t got = read(fd, at, size);
		if (got <= 0) {
			if (got < 0 && errno != EAGAIN && errno != EINTR)
				die("read", "control port");
			if (got == 0)
				usleep(1000); /* the host's end is not announced yet */
			poll(&(struct pollfd){ .fd = fd, .events = POLLIN }, 1, -1);
			continue;
		}
		at += got;
		size -= (size_t)got;
	}
}

static void load_modules(const char *list)
{
	char path[256];
	FILE *file = fopen(list, "re");

	if (!file)
		die("open", list);
	while (fgets(path, sizeof(path), file)) {
		path[strcspn(path, "\n")] = '\0';
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0)
			die("open", path);
		if (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST)
			die("load module", path);
		close(fd);
	}
	fclose(file);
}

static bool read_line(char *into, size_t size, const char *format, const char *name)
{
	char path[512];

	snprintf(path, sizeof(path), format, name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	ssize_t got = read(fd, into, size - 1);
	close(fd);
	if (got < 0)
		got = 0;
	into[got] = '\0';
	into[strcspn(into, "\n")] = '\0';
	return true;
}

/* Look through a /sys directory for the entry whose file says `wanted`; waits for late probes. */
void find_entry(char *into, size_t size, const char *directory, const char *format,
		const char *wanted)
{
	for (int attempt = 0; attempt < 30000; attempt++) {
		DIR *entries = opendir(directory);
		struct dirent *entry;
		char value[64];

		while (entries && (entry = readdir(entries))) {
			if (entry->d_name[0] == '.')
				continue;
			if (read_line(value, sizeof(value), format, entry->d_name) &&
			    strcmp(value, wanted) == 0) {
				snprintf(into, size, "%s", entry->d_name);
				closedir(entries);
				return;
			}
		}
		if (entries)
			closedir(entries);
		usleep(1000);
	}
	errno = ENODEV;
	die("find", wanted);
}

void find_port(char *path, size_t size, const char *name)
{
	char entry[256];

	find_entry(entry, sizeof(entry), "/sys/class/virtio-ports",
		   "/sys/class/virtio-ports/%s/name", name);
	snprintf(path, size, "/dev/%s", entry);
}

int open_port(const char *name)
{
	char path[300];

	find_port(path, sizeof(path), name);
	int fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
	if (fd < 0)
		die("open", path);
	return fd;
}

void find_disk(char *path, size_t size, const char *serial)
{
	char entry[256];

	find_entry(entry, sizeof(entry), "/sys/block", "/sys/block/%s/serial", serial);
	snprintf(path, size, "/dev/%s", entry);
}

static void raise_loopback(void)
{
	struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
		die("raise", "lo");
	close(fd);
}

/* The root disk stays read-only until the machine has been resumed; the rest is in memory. */
static void enter_root(void)
{
	char root[300];

	find_disk(root, sizeof(root), "root");
	must_mount(root, "/new", "ext4", MS_NOATIME | MS_RDONLY, NULL);
	must_mount("devtmpfs", "/new/dev", "devtmpfs", MS_NOSUID, NULL);
	must_mount("proc", "/new/proc", "proc", 0, NULL);
	must_mount("sysfs", "/new/sys", "sysfs", 0, NULL);
	must_mount("tmpfs", "/new/run", "tmpfs", 0, "mode=755");
	must_mount("tmpfs", "/new/tmp", "tmpfs", 0, "mode=1777");
	must_mount("tmpfs", "/new/run/lab", "tmpfs", 0, "mode=755");
	must_mount("cgroup2", "/new/sys/fs/cgroup", "cgroup2", 0, NULL);
	must_mount("debugfs", "/new/sys/kernel/debug", "debugfs", 0, NULL);
	must_mount("devpts", "/new/dev/pts", "devpts", 0, "mode=620,ptmxmode=666,gid=5");
	must_mount("tmpfs", "/new/dev/shm", "tmpfs", 0, "mode=1777");
	must_mount("hugetlbfs", "/new/dev/hugepages", "hugetlbfs", 0, NULL);
	if (chdir("/new") < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 ||
	    chdir("/") < 0)
		die("move to", "root");
	if (symlink("/proc/self/fd", "/dev/fd") < 0 ||
	    symlink("/proc/self/fd/0", "/dev/stdin") < 0 ||
	    symlink("/proc/self/fd/1", "/dev/stdout") < 0 ||
	    symlink("/proc/self/fd/2", "/dev/stderr") < 0)
		die("link", "/dev/fd");
}

/* Have what nearly every run needs in memory when the machine is saved. */
static void warm_up(void)
{
	const char *const commands[][4] = {
		{ "/usr/bin/python3", "-c", "import argparse, subprocess, json, socket, typing", NULL },
		{ "/bin/bash", "-c", "tar --version | cat", NULL },
	};

	for (size_t i = 0; i < sizeof(commands) / sizeof(commands[0]); i++) {
		pid_t pid = fork();
		if (pid == 0) {
			int null = open("/dev/null", O_RDWR);
			dup2(null, 1);
			execv(commands[i][0], (char *const *)commands[i]);
			_exit(127);
		}
		waitpid(pid, NULL, 0);
	}
}

int main(void)
{
	static struct session session;
	int status;

	must_mount("proc", "/proc", "proc", 0, NULL);
	must_mount("sysfs", "/sys", "sysfs", 0, NULL);
	must_mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
	load_modules("/modules.early");
	pid_t loader = fork();
	if (loader == 0) {
		load_modules("/modules.late");
		_exit(0);
	}
	control_port = open_port("control");
	open_data_ports();
	start_heartbeats();
	enter_root();
	raise_loopback();
	if (sethostname("lab", 3) < 0)
		die("set", "hostname");
	if (waitpid(loader, &status, 0) < 0 || status != 0) {
		errno = ENOEXEC;
		die("load", "modules");
	}
	setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin", 1);
	warm_up();
	say("ready\n");
	read_session(&session);
	run_session(&session);
	for (;;)
		pause();
}
