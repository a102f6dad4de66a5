/*
 * Process 1 of the lab: one static program in place of a shell and busybox, because under
 * emulation every exec costs tens of milliseconds. main.c starts the machine, session.c sets up
 * what one run asks for, tree.c unpacks its files, relay.c runs its command; heartbeat.c keeps the
 * emulated CPUs from freezing.
 *
 * The machine is saved when it has said "ready" and resumed from there for each run, so all that
 * comes before must be the same for every run: fixed disks, nothing mounted writable, no clock.
 *
 * Ports (/dev/virtio-ports is udev's doing, so they are found in /sys/class/virtio-ports):
 *   control   both ways, see below
 *   stdin     host to command       stdout, stderr, out   command to host
 *   heartbeat0, heartbeat1, ...     host to lab, one for each CPU: a byte now and then, see heartbeat.c
 * Data ports carry plain bytes. Where a stream ends is said on the control port as a byte count,
 * because closing a port says nothing about what is still under way in it.
 *
 * Control, host to lab: messages of 1 byte kind, le32 size, payload.
 *   S  the session, NUL-terminated items, the first byte tells the kind:
 *        c SEC NSEC        set the clock            r TEXT                64 secret bytes, in hex
 *        u SERIAL          unpack that disk, a cpio archive, to /run/lab
 *        b PATH            bind /run/lab/PATH there  m ro|rw SERIAL PATH   mount that disk there
 *        l TARGET LINK     make a symbolic link     e NAME=VALUE          environment
 *        d PATH            working directory        o PATH                sent back over "out" as
 *                                                   a tar archive when the command is done
 *        t ROWS COLUMNS    give the command a terminal
 *        a WORD            a word of the command
 *   W  le16 rows, le16 columns: the terminal's size      K  kill everything now
 *   E  le64 bytes: the end of stdin                      P  1 byte 1|2: nobody reads that stream
 * Control, lab to host: lines.
 *   ready     the machine waits for a session
 *   up        the command is about to start
 *   exit CODE STDOUT STDERR OUT      its status, and how many bytes each stream carried
 *   fail TEXT                        the session cannot be set up
 */
#ifndef LAB_H
#define LAB_H

#include <stdbool.h>
#include <stddef.h>
#include <termios.h>
#include <sys/ioctl.h>

enum { WORDS_MAX = 4096 };

/* What one run asks for. The strings lie in the S message, which is never freed. */
struct session {
	char *words[WORDS_MAX];
	size_t word_count;
	char *environment[WORDS_MAX];
	size_t environment_count;
	const char *directory;
	const char *out;
	bool has_terminal;
	struct winsize window;
};

/* main.c: say one line to the host; say why this cannot go on, and end */
extern int control_port;
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void die(const char *what, const char *object) __attribute__((noreturn));

/* main.c: devices by the name the host gave them, without udev */
void find_entry(char *into, size_t size, const char *directory, const char *format,
		const char *wanted);
void find_disk(char *path, size_t size, const char *serial);
void find_port(char *path, size_t size, const char *name);
int open_port(const char *name);
void read_exact(int fd, void *into, size_t size);

/* heartbeat.c: have each CPU interrupted by its port */
void start_heartbeats(void);

/* session.c */
void make_directories(const char *path);
void must_mount(const char *source, const char *target, const char *type, unsigned long flags,
		const char *options);
void read_session(struct session *session);

/* tree.c: unpack a cpio archive ("newc"), read from `source`, below `target` */
void unpack_archive(const char *source, const char *target);

/* relay.c: open the data ports; run the command to its end and tell the host */
void open_data_ports(void);
void run_session(struct session *session);

#endif
