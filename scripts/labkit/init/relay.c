/* Run the command and relay its streams: see lab.h. */
#define _GNU_SOURCE
#include "lab.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pty.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BUFFER_SIZE = 32768 }; /* as much as the port's driver takes at a time */

/* One direction of one stream. end < 0: not known yet. */
struct relay {
	int from;
	int to;
	bool ended;
	int64_t count;
	int64_t end;
	size_t start;
	size_t fill;
	char buffer[BUFFER_SIZE];
};

static struct relay to_stdin, from_stdout, from_stderr, from_out;
static int terminal = -1;

static void run_child(struct session *session, const int fds[3])
{
	sigset_t none;

	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGPIPE, SIG_DFL);
	setsid();
	for (int fd = 0; fd < 3; fd++)
		dup2(fds[fd], fd);
	if (session->has_terminal)
		ioctl(0, TIOCSCTTY, 0);
	if (session->directory && chdir(session->directory) < 0) {
		fprintf(stderr, "lab: %s: %s\n", session->directory, strerror(errno));
		_exit(126);
	}
	environ = session->environment;
	execvp(session->words[0], session->words);
	fprintf(stderr, "lab: %s: %s\n", session->words[0], strerror(errno));
	_exit(errno == ENOENT ? 127 : 126);
}

/* The pipe ends for the child; ours go into the relays. All of them above 2. */
static void open_streams(struct session *session, int child[3])
{
	int in[2], out[2], err[2];

	if (session->has_terminal) {
		int slave;
		if (openpty(&terminal, &slave, NULL, NULL, &session->window) < 0)
			die("open", "pty");
		fcntl(terminal, F_SETFD, FD_CLOEXEC);
		fcntl(terminal, F_SETFL, O_NONBLOCK);
		child[0] = child[1] = child[2] = slave;
		to_stdin.to = terminal;
		from_stdout.from = dup(terminal);
		fcntl(from_stdout.from, F_SETFD, FD_CLOEXEC);
		from_stderr.ended = true;
		return;
	}
	if (pipe2(in, O_CLOEXEC) < 0 || pipe2(out, O_CLOEXEC) < 0 || pipe2(err, O_CLOEXEC) < 0)
		die("open", "pipe");
	fcntl(in[1], F_SETFL, O_NONBLOCK);
	child[0] = in[0];
	child[1] = out[1];
	child[2] = err[1];
	to_stdin.to = in[1];
	from_stdout.from = out[0];
	from_stderr.from = err[0];
}

static void end_relay(struct relay *relay, int *ours)
{
	if (*ours >= 0)
		close(*ours);
	*ours = -1;
	relay->ended = true;
}

/* Move what can be moved without blocking. Returns with nothing done if neither end is ready. */
static void pump(struct relay *relay, bool can_read, bool can_write, int *ours)
{
	if (relay->ended)
		return;
	if (relay->fill == 0 && can_read) {
		ssize_t got = read(relay->from, relay->buffer, sizeof(relay->buffer));
		if (got > 0) {
			relay->fill = (size_t)got;
			relay->start = 0;
			can_write = true;
		} else if (ours == &relay->from && (got == 0 || errno == EIO)) {
			end_relay(relay, ours); /* EIO: nobody holds the terminal any more */
			return;
		}
	}
	if (relay->fill > 0 && can_write) {
		ssize_t put = write(relay->to, relay->buffer + relay->start, relay->fill);
		if (put > 0) {
			relay->start += (size_t)put;
			relay->fill -= (size_t)put;
			relay->count += put;
		} else if (put < 0 && errno != EAGAIN && errno != EINTR) {
			relay->count += (int64_t)relay->fill; /* the command closed its stdin */
			relay->fill = 0;
		}
	}
	if (relay->end >= 0 && relay->count >= relay->end && relay->fill == 0) {
		if (terminal >= 0 && write(terminal, "\004", 1) < 0)
			perror("lab: terminal");
		end_relay(relay, ours);
	}
}

static void take_message(void)
{
	unsigned char header[5], payload[8] = { 0 };
	uint32_t size;
	ssize_t got = read(control_port, header, 1);

	if (got != 1)
		return;
	read_exact(control_port, header + 1, 4);
	memcpy(&size, header + 1, sizeof(size));
	read_exact(control_port, payload, size > sizeof(payload) ? sizeof(payload) : size);
	switch (header[0]) {
	case 'W': {
		struct winsize window = { 0 };
		memcpy(&window.ws_row, payload, 2);
		memcpy(&window.ws_col, payload + 2, 2);
		if (terminal >= 0)
			ioctl(terminal, TIOCSWINSZ, &window);
		break;
	}
	case 'K':
		kill(-1, SIGKILL);
		break;
	case 'E':
		memcpy(&to_stdin.end, payload, 8);
		pump(&to_stdin, false, false, &to_stdin.to);
		break;
	case 'P': {
		struct relay *relay = payload[0] == 1 ? &from_stdout : &from_stderr;
		relay->fill = 0;
		end_relay(relay, &relay->from);
		break;
	}
	}
}

/* Relay until `child` is gone and, as all others are killed then, its streams have ended. */
static int relay_until_exit(pid_t child, int signals, struct relay *outputs[2])
{
	int status = -1;
	bool gone = false;

	while (!gone || !outputs[0]->ended || !outputs[1]->ended) {
		struct pollfd fds[8] = {
			{ .fd = signals, .events = POLLIN },
			{ .fd = control_port, .events = POLLIN },
			{ .fd = to_stdin.ended || to_stdin.fill ? -1 : to_stdin.from, .events = POLLIN },
			{ .fd = to_stdin.ended || !to_stdin.fill ? -1 : to_stdin.to, .events = POLLOUT },
		};
		for (int i = 0; i < 2; i++) {
			struct relay *relay = outputs[i];
			bool reads = !relay->ended && !relay->fill;
			bool writes = !relay->ended && relay->fill;
			fds[4 + 2 * i] = (struct pollfd){ .fd = reads ? relay->from : -1, .events = POLLIN };
			fds[5 + 2 * i] = (struct pollfd){ .fd = writes ? relay->to : -1, .events = POLLOUT };
		}
		if (poll(fds, 8, -1) < 0)
			continue;
		if (fds[0].revents) {
			struct signalfd_siginfo info;
			int ended;
			pid_t pid;
			if (read(signals, &info, sizeof(info)) < 0)
				perror("lab: signalfd");
			while ((pid = waitpid(-1, &ended, WNOHANG)) > 0) {
				if (pid != child)
					continue;
				status = WIFSIGNALED(ended) ? 128 + WTERMSIG(ended) : WEXITSTATUS(ended);
				gone = true;
				kill(-1, SIGKILL);
			}
		}
		if (fds[1].revents & POLLIN)
			take_message();
		pump(&to_stdin, fds[2].revents, fds[3].revents, &to_stdin.to);
		for (int i = 0; i < 2; i++)
			pump(outputs[i], fds[4 + 2 * i].revents, fds[5 + 2 * i].revents,
			     &outputs[i]->from);
	}
	return status;
}

static int start_and_relay(struct session *session, int signals, const int child[3],
			   struct relay *outputs[2])
{
	pid_t pid = fork();

	if (pid < 0)
		die("fork", session->words[0]);
	if (pid == 0)
		run_child(session, child);
	for (int fd = 0; fd < 3; fd++)
		if (fd == 0 || child[fd] != child[0])
			close(child[fd]);
	return relay_until_exit(pid, signals, outputs);
}

static void send_out(struct session *session, int signals)
{
	struct session tar = {
		.words = { "tar", "-C", (char *)session->out, "--sparse", "-cf", "-", "." },
		.environment = { "PATH=/usr/bin:/bin" },
	};
	int out[2];
	int console = open("/dev/console", O_RDWR | O_CLOEXEC);

	if (rmdir(session->out) == 0) /* nothing was written there */
		return;
	if (pipe2(out, O_CLOEXEC) < 0)
		die("open", "pipe");
	from_out.from = out[0];
	to_stdin.ended = from_stderr.ended = true;
	start_and_relay(&tar, signals, (int[3]){ console, out[1], console },
			(struct relay *[2]){ &from_out, &from_stderr });
}

void open_data_ports(void)
{
	to_stdin = (struct relay){ .from = open_port("stdin"), .to = -1, .end = -1 };
	from_stdout = (struct relay){ .from = -1, .to = open_port("stdout"), .end = -1 };
	from_stderr = (struct relay){ .from = -1, .to = open_port("stderr"), .end = -1 };
	from_out = (struct relay){ .from = -1, .to = open_port("out"), .end = -1 };
}

void run_session(struct session *session)
{
	struct relay *outputs[2] = { &from_stdout, &from_stderr };
	sigset_t set;
	int child[3];

	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, NULL);
	int signals = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
	open_streams(session, child);
	say("up\n");
	int status = start_and_relay(session, signals, child, outputs);
	if (session->out)
		send_out(session, signals);
	say("exit %d %lld %lld %lld\n", status, (long long)from_stdout.count,
	    (long long)from_stderr.count, (long long)from_out.count);
}
