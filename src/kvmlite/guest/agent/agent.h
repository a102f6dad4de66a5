/* kvmlite guest agent: everything one file of it calls in another, grouped by file.
 *
 * The agent is one static program. As PID 1 it sets the guest up (init.c), forks the serving process and then only
 * reaps orphans; the serving process speaks to the host over one framed byte stream (wire.c, serve.c) and runs
 * commands (exec.c, exec_message.c, child.c). The wire format is in protocol.h. One thread, no locks; each process
 * owns its state.
 */
#ifndef KVMLITE_AGENT_H
#define KVMLITE_AGENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "protocol.h"

#define AGENT_VERSION "0.1.0"
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

enum {
    NS_PER_S = 1000000000,
    NS_PER_MS = 1000000,
    MODULE_ERRORS_MAX = 32,
    MODULE_ERROR_SIZE = 128,
};

/* conf.c: /kvmlite/agent.conf, key=value lines written by the host into the initramfs. */
struct conf {
    char hostname[65];         /* at most 64 characters, as the kernel allows */
    char path[256];            /* PATH of commands that bring none */
    enum channel_kind channel; /* CHANNEL_AUTO: the first that works */
    uint32_t vsock_port;       /* on the host, CID 2 */
    uint32_t channel_wait_ms;  /* how long a device may take to appear */
    uint32_t loss_grace_ms;    /* PID 1 powers off so long after the serving process has died */
};
void conf_defaults(struct conf *conf);
void conf_read(struct conf *conf, const char *file);

/* log.c: one line to the kernel log (or to stderr when not PID 1's descendant). */
void log_open(bool to_kernel);
void log_line(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint64_t clock_monotonic_ns(void);

/* init.c: duties of PID 1. */
int init_run(uint64_t start_ns);     /* never returns in the parent, except on failure */
int mount_at(const char *source, const char *target, const char *type, unsigned long flags, const char *data);
void system_finish(const struct conf *conf); /* the rest of the set-up, once the host has had its HELLO */

/* root.c: from the initramfs to another root file system; each returns 0 or an errno. */
int root_prepare(void);                    /* before all else: makes root_change possible */
int root_change(const char *directory);    /* a mount point; /dev, /proc and /sys go along */

/*
 * disk.c: disks wherever the kernel has put them: "serial:NAME", or "mmio:ADDRESS" (hexadecimal) by where its registers are;
 * with ":NUMBER" a partition of it. disk_find: the device, as /dev/NAME; 0 or an errno.
 */
enum { DISK_PATH_SIZE = 64 };
bool disk_is_named(const char *source);
int disk_find(const char *source, char ret[DISK_PATH_SIZE]);

/* network.c: one interface, as the payload of NETWORK says; 0 or an errno. */
int network_configure(const uint8_t *payload, size_t size);

/* module.c */
struct module_errors {
    unsigned int count; /* all failures; only the first MODULE_ERRORS_MAX are kept */
    char text[MODULE_ERRORS_MAX][MODULE_ERROR_SIZE]; /* "errno path" */
};
void modules_load(const char *list, struct module_errors *ret);

/* channel.c: a connected, non-blocking byte stream to the host; -1 with errno if none came up in time. */
int channel_open(const struct conf *conf, enum channel_kind *ret_kind);
void channel_break(enum channel_kind kind);

/* wire.c: frames in and out of the byte stream; memory is two fixed buffers. */
enum {
    WIRE_IN_SIZE = 2 * (PROTOCOL_HEADER_SIZE + PROTOCOL_PAYLOAD_MAX),
    WIRE_OUT_SIZE = 256 * 1024,
    WIRE_DATA_LIMIT = 64 * 1024,     /* more unsent bytes than this: no further stream data */
    WIRE_REPLY_LIMIT = 128 * 1024,   /* more than this: no further frames are taken from the host */
};
struct wire {
    int fd;
    bool broken;  /* end of file, a failed call or a peer that broke the rules */
    bool stalled; /* the last write could not send all */
    size_t in_head, in_tail, out_head, out_tail;
    uint8_t in[WIRE_IN_SIZE], out[WIRE_OUT_SIZE];
};
struct frame {
    uint8_t type, flags;
    uint32_t id, size;
    const uint8_t *payload; /* inside wire->in: valid until the next wire_fill */
};
void wire_init(struct wire *wire, int fd);
void wire_fill(struct wire *wire);                         /* read what is there */
bool wire_next(struct wire *wire, struct frame *ret);      /* take one whole frame */
void wire_flush(struct wire *wire);                        /* write what is possible */
size_t wire_unsent(const struct wire *wire);
uint8_t *wire_data_space(struct wire *wire);               /* room for PROTOCOL_DATA_CHUNK bytes of payload */
void wire_data_commit(struct wire *wire, uint8_t type, uint8_t flags, uint32_t id, uint32_t size);
void wire_send(struct wire *wire, uint8_t type, uint8_t flags, uint32_t id, const void *payload, uint32_t size);
void wire_send_words(struct wire *wire, uint8_t type, uint32_t id, uint32_t first, uint32_t second);
void wire_fail(struct wire *wire, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* request.c: the payload of EXEC, taken apart; the strings point into the buffer given. */
struct exec_request {
    uint32_t stdout_window, stderr_window, flags;
    uint16_t columns, rows;
    const char *user, *cwd;
    char **argv, **envp; /* NULL-terminated; envp has room for REQUEST_ENV_EXTRA more */
    size_t env_count;
    char *memory;
};
enum { REQUEST_ENV_EXTRA = 4 };
int exec_request_init(struct exec_request *request, const uint8_t *payload, size_t size); /* 0 or an errno */
void exec_request_deinit(struct exec_request *request);
const char *exec_request_env(const struct exec_request *request, const char *name);

/* user.c: names from /etc/passwd and /etc/group, read directly (no NSS in a static program). */
struct user {
    uid_t uid;
    gid_t gid;
    size_t group_count;
    gid_t groups[64];
    char name[64], home[256];
};
int user_resolve(const char *spec, struct user *ret); /* "", "name", "uid", with ":group" or ":gid"; 0 or an errno */

/* child.c: between fork and exec. */
struct child_setup {
    int stdin_fd, stdout_fd, stderr_fd; /* what becomes 0, 1 and 2 */
    int status_fd;                      /* close-on-exec; gets a struct child_failure if exec is not reached */
    bool tty;
};
struct child_failure {
    uint32_t stage, error;
};
size_t files_allow(size_t count);
void child_exec(struct exec_request *request, const struct child_setup *setup, const char *default_path)
    __attribute__((noreturn));

/* exec.c: one running command. */
struct output {
    int fd;             /* -1 once at its end */
    uint8_t type;       /* MESSAGE_STDOUT or MESSAGE_STDERR */
    bool is_finished;   /* the end was sent to the host */
    bool is_bounded;    /* the command has ended: at most `remaining` bytes are still its own */
    uint32_t credit;    /* bytes the host will take */
    size_t remaining;
};
struct exec {
    struct exec *next;
    uint32_t id; /* 0: failed to start, only waiting to be reaped */
    pid_t pid;
    bool tty, exited, stdin_eof, stdin_newline;
    int status_fd;     /* -1 once it is known whether exec was reached */
    int stdin_fd;      /* -1 once closed */
    uint32_t stdin_credit, stdin_unacked;
    uint8_t *stdin_ring; /* PROTOCOL_STDIN_WINDOW bytes, from the first byte that did not fit the pipe */
    size_t stdin_head, stdin_size;
    struct output outputs[2];
};
struct exec *exec_start(struct wire *wire, uint32_t id, struct exec_request *request, const char *default_path);
void exec_destroy(struct exec *exec);
bool exec_is_finished(const struct exec *exec);
void exec_read_status(struct exec *exec, struct wire *wire);
void exec_take_stdin(struct exec *exec, struct wire *wire, const struct frame *frame);
void exec_pump_stdin(struct exec *exec, struct wire *wire);
void exec_close_stdin(struct exec *exec, struct wire *wire, bool tell_host);
void exec_pump_output(struct exec *exec, struct wire *wire, struct output *output);
void exec_end_output(struct exec *exec, struct wire *wire, struct output *output);
void exec_reaped(struct exec *exec, struct wire *wire, int wait_status);

/* exec_message.c: what the host tells a command: input, windows, signals, the size of its terminal. */
void exec_take_message(struct exec *exec, struct wire *wire, const struct frame *frame);

/* control.c: what the host asks of the system rather than of a command; each returns 0 or an errno. */
int control_set_clock(const struct frame *frame);
int control_add_entropy(const struct frame *frame);
int control_mount(const struct frame *frame);
int control_root(const struct frame *frame, bool is_system); /* EPERM if not */
int control_mkdir(const struct frame *frame);
int control_sync(const struct frame *frame);
int control_network(const struct frame *frame, bool is_system); /* EPERM if not */
int control_shutdown_kind(const struct frame *frame, int *ret_command); /* a reboot(2) command */
void control_shutdown(int command, bool anyone_running) __attribute__((noreturn));

/* serve.c: the loop of the serving process; returns when the channel has ended. */
struct serve_options {
    const struct conf *conf;
    const struct module_errors *module_errors;
    enum channel_kind kind;
    uint64_t start_ns;
    bool is_system; /* false: an ordinary process under test, which may not shut the machine down */
};
int serve_run(int fd, const struct serve_options *options);

#endif
