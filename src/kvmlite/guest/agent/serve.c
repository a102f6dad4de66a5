#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

enum {
    POLL_FIXED = 2,    /* the channel and the signal fd */
    POLL_PER_EXEC = 4, /* status, stdin, stdout, stderr */
    FILES_FIXED = 64,  /* descriptors that are not a running command's */
    GOODBYE_MS = 1000, /* for the last frames before a shutdown */
};

static struct {
    struct wire wire;
    const struct serve_options *options;
    bool is_greeted; /* the host's HELLO has come and fits ours */
    struct exec *execs;
    size_t exec_count, execs_max;
    uint8_t *request; /* an EXEC that spans frames */
    size_t request_size;
    uint32_t request_id;
    struct pollfd polls[POLL_FIXED + POLL_PER_EXEC * PROTOCOL_EXECS_MAX];
} server;

/* HELLO: 0 magic "KVLA" / 4 le16 version / 6 u8 channel / 7 u8 is PID 1's / 8 le64 start / 16 le64 now (CLOCK_MONOTONIC,
 * ns) / 24 le32 count of module errors / 28 NUL-terminated strings: agent version, kernel release, "errno path" each. */
struct hello {
    char magic[4];
    uint16_t version;
    uint8_t channel, is_system;
    uint64_t start_ns, now_ns;
    uint32_t error_count;
} __attribute__((packed));
_Static_assert(sizeof(struct hello) == 28, "as in the table");

static size_t put_string(uint8_t *space, const char *text)
{
    size_t size = strlen(text) + 1;

    memcpy(space, text, size);
    return size;
}

static void send_hello(void)
{
    static uint8_t payload[sizeof(struct hello) + 512 + MODULE_ERRORS_MAX * MODULE_ERROR_SIZE];
    const struct module_errors *errors = server.options->module_errors;
    unsigned int error_count = errors->count < MODULE_ERRORS_MAX ? errors->count : MODULE_ERRORS_MAX;
    struct hello hello = {
        .magic = PROTOCOL_MAGIC,
        .version = htole16(PROTOCOL_VERSION),
        .channel = (uint8_t)server.options->kind,
        .is_system = server.options->is_system,
        .start_ns = htole64(server.options->start_ns),
        .now_ns = htole64(clock_monotonic_ns()),
        .error_count = htole32(error_count),
    };
    struct utsname names;
    size_t size = sizeof(hello);

    uname(&names);
    memcpy(payload, &hello, sizeof(hello));
    size += put_string(payload + size, AGENT_VERSION);
    size += put_string(payload + size, names.release);
    for (unsigned int index = 0; index < error_count; index++)
        size += put_string(payload + size, errors->text[index]);
    wire_send(&server.wire, MESSAGE_HELLO, 0, 0, payload, (uint32_t)size);
}

/* The host's HELLO: 0 magic / 4 le16 version / 6 le16 zero. */
static void take_hello(const struct frame *frame)
{
    uint16_t version = 0;

    if (frame->size == 8 && memcmp(frame->payload, PROTOCOL_MAGIC, 4) == 0)
        memcpy(&version, frame->payload + 4, sizeof(version));
    version = le16toh(version);
    if (version != PROTOCOL_VERSION)
        wire_fail(&server.wire, "host speaks protocol %u, this agent %u", version, PROTOCOL_VERSION);
    server.is_greeted = true;
}

static struct exec *find_exec(uint32_t id)
{
    struct exec *exec = server.execs;

    while (exec != NULL && exec->id != id)
        exec = exec->next;
    return id == 0 ? NULL : exec;
}

static void start_exec(uint32_t id, const uint8_t *payload, size_t size)
{
    struct exec_request request;
    int error = EAGAIN;

    if (server.exec_count < server.execs_max)
        error = exec_request_init(&request, payload, size);
    if (error != 0) {
        wire_send_words(&server.wire, MESSAGE_EXEC_FAILED, id, STAGE_REQUEST, (uint32_t)error);
        return;
    }
    struct exec *exec = exec_start(&server.wire, id, &request, server.options->conf->path);

    exec_request_deinit(&request);
    if (exec == NULL)
        return;
    exec->next = server.execs;
    server.execs = exec;
    server.exec_count++;
}

static void take_exec(const struct frame *frame)
{
    bool continues = server.request_size > 0;

    if (frame->id == 0 || find_exec(frame->id) != NULL || (continues && frame->id != server.request_id) ||
        server.request_size + frame->size > PROTOCOL_EXEC_MAX) {
        wire_fail(&server.wire, "exec %u: id in use, or more than %u bytes", frame->id, PROTOCOL_EXEC_MAX);
        return;
    }
    if (!continues && !(frame->flags & FLAG_MORE)) {
        start_exec(frame->id, frame->payload, frame->size);
        return;
    }
    uint8_t *grown = realloc(server.request, server.request_size + frame->size + 1);

    if (grown == NULL) {
        wire_fail(&server.wire, "exec %u: out of memory", frame->id);
        return;
    }
    memcpy(grown + server.request_size, frame->payload, frame->size);
    server.request = grown;
    server.request_size += frame->size;
    server.request_id = frame->id;
    if (frame->flags & FLAG_MORE)
        return;
    start_exec(frame->id, server.request, server.request_size);
    free(server.request);
    server.request = NULL;
    server.request_size = 0;
}

static void take_exec_message(const struct frame *frame)
{
    struct exec *exec = find_exec(frame->id);

    if (exec != NULL) /* else it has ended meanwhile */
        exec_take_message(exec, &server.wire, frame);
}

static void send_result(uint32_t id, int error)
{
    uint32_t word = htole32((uint32_t)error);

    wire_send(&server.wire, MESSAGE_RESULT, 0, id, &word, sizeof(word));
}

static void flush_before(uint64_t deadline_ns)
{
    while (!server.wire.broken && wire_unsent(&server.wire) > 0 && clock_monotonic_ns() < deadline_ns) {
        struct pollfd channel = {.fd = server.wire.fd, .events = POLLOUT};

        poll(&channel, 1, 10);
        wire_flush(&server.wire);
    }
}

static void take_shutdown(const struct frame *frame)
{
    int command = 0, error = control_shutdown_kind(frame, &command);

    send_result(frame->id, error);
    if (error != 0)
        return;
    flush_before(clock_monotonic_ns() + (uint64_t)GOODBYE_MS * NS_PER_MS);
    if (server.options->is_system)
        control_shutdown(command, server.exec_count > 0);
    server.wire.broken = true;
}

static void send_pong(uint32_t id)
{
    uint64_t now = htole64(clock_monotonic_ns());

    wire_send(&server.wire, MESSAGE_PONG, 0, id, &now, sizeof(now));
}

static void take_frame(const struct frame *frame)
{
    if (!server.is_greeted && frame->type != MESSAGE_HELLO) {
        wire_fail(&server.wire, "message %u before HELLO", frame->type);
        return;
    }
    switch (frame->type) {
    case MESSAGE_HELLO:
        take_hello(frame);
        break;
    case MESSAGE_EXEC:
        take_exec(frame);
        break;
    case MESSAGE_STDIN:
    case MESSAGE_WINDOW:
    case MESSAGE_CLOSE:
    case MESSAGE_SIGNAL:
    case MESSAGE_WINSIZE:
        take_exec_message(frame);
        break;
    case MESSAGE_PING:
        send_pong(frame->id);
        break;
    case MESSAGE_CLOCK_SET:
        send_result(frame->id, control_set_clock(frame));
        break;
    case MESSAGE_ENTROPY:
        send_result(frame->id, control_add_entropy(frame));
        break;
    case MESSAGE_MOUNT:
        send_result(frame->id, control_mount(frame));
        break;
    case MESSAGE_ROOT:
        send_result(frame->id, control_root(frame, server.options->is_system));
        break;
    case MESSAGE_MKDIR:
        send_result(frame->id, control_mkdir(frame));
        break;
    case MESSAGE_SYNC:
        send_result(frame->id, control_sync(frame));
        break;
    case MESSAGE_NETWORK:
        send_result(frame->id, control_network(frame, server.options->is_system));
        break;
    case MESSAGE_SHUTDOWN:
        take_shutdown(frame);
        break;
    default:
        wire_fail(&server.wire, "message of unknown type %u", frame->type);
    }
}

static bool takes_frames(void)
{
    return !server.wire.broken && wire_unsent(&server.wire) < WIRE_REPLY_LIMIT;
}

static void take_frames(void)
{
    struct frame frame;

    while (takes_frames() && wire_next(&server.wire, &frame))
        take_frame(&frame);
}

static void reap(void)
{
    int status;
    pid_t pid;

    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        struct exec *exec = server.execs;

        while (exec != NULL && exec->pid != pid)
            exec = exec->next;
        if (exec != NULL)
            exec_reaped(exec, &server.wire, status);
    }
}

static void drop_finished(void)
{
    for (struct exec **link = &server.execs; *link != NULL;) {
        struct exec *exec = *link;

        if (!exec_is_finished(exec)) {
            link = &exec->next;
            continue;
        }
        *link = exec->next;
        exec_destroy(exec);
        server.exec_count--;
    }
}

static void set_poll(size_t slot, int fd, short events, bool is_wanted)
{
    server.polls[slot] = (struct pollfd){.fd = is_wanted ? fd : -1, .events = events};
}

/* A stream without credit is left out entirely: poll reports POLLHUP even when no event was asked for. Standard input
 * of a pipe stays in, so that a command which closes it is noticed. */
static size_t prepare_polls(int signal_fd)
{
    bool takes_data = wire_unsent(&server.wire) < WIRE_DATA_LIMIT;
    short channel_events = (short)((takes_frames() ? POLLIN : 0) | (wire_unsent(&server.wire) > 0 ? POLLOUT : 0));
    size_t slot = POLL_FIXED;

    set_poll(0, server.wire.fd, channel_events, true);
    set_poll(1, signal_fd, POLLIN, true);
    for (struct exec *exec = server.execs; exec != NULL; exec = exec->next) {
        bool has_input = exec->stdin_size > 0;

        set_poll(slot++, exec->status_fd, POLLIN, true);
        set_poll(slot++, exec->stdin_fd, has_input ? POLLOUT : 0, has_input || !exec->tty);
        for (int index = 0; index < 2; index++) {
            const struct output *output = &exec->outputs[index];

            set_poll(slot++, output->fd, POLLIN, takes_data && output->credit > 0);
        }
    }
    return slot;
}

static void pump_exec(struct exec *exec, const struct pollfd *polls)
{
    if (polls[0].revents != 0 && exec->status_fd >= 0)
        exec_read_status(exec, &server.wire);
    if ((polls[1].revents & POLLOUT) && exec->stdin_fd >= 0)
        exec_pump_stdin(exec, &server.wire);
    else if ((polls[1].revents & POLLERR) && !exec->tty)
        exec_close_stdin(exec, &server.wire, true);
    for (int index = 0; index < 2; index++) {
        struct output *output = &exec->outputs[index];
        bool is_ready = polls[2 + index].revents != 0 || output->is_bounded;

        if (is_ready && output->fd >= 0 && exec->status_fd < 0 && wire_unsent(&server.wire) < WIRE_DATA_LIMIT)
            exec_pump_output(exec, &server.wire, output);
    }
}

/* The last is first in the next round, so that one flood does not starve the others of the channel. */
static void rotate_execs(void)
{
    struct exec *first = server.execs, **end = &server.execs;

    if (first == NULL || first->next == NULL)
        return;
    while (*end != NULL)
        end = &(*end)->next;
    server.execs = first->next;
    first->next = NULL;
    *end = first;
}

static bool has_drained_output(void)
{
    if (wire_unsent(&server.wire) >= WIRE_DATA_LIMIT)
        return false;
    for (const struct exec *exec = server.execs; exec != NULL; exec = exec->next) {
        for (int index = 0; index < 2; index++) {
            const struct output *output = &exec->outputs[index];

            if (output->is_bounded && !output->is_finished && output->credit > 0)
                return true;
        }
    }
    return false;
}

static void serve_round(int signal_fd)
{
    struct signalfd_siginfo information;
    size_t count = prepare_polls(signal_fd);
    size_t slot = POLL_FIXED;

    if (poll(server.polls, count, has_drained_output() ? 0 : -1) < 0)
        return;
    for (struct exec *exec = server.execs; exec != NULL; exec = exec->next, slot += POLL_PER_EXEC)
        pump_exec(exec, server.polls + slot);
    if (server.polls[1].revents != 0 && read(signal_fd, &information, sizeof(information)) > 0)
        reap();
    if (server.polls[0].revents & (POLLIN | POLLHUP | POLLERR))
        wire_fill(&server.wire);
    take_frames();
    drop_finished();
    rotate_execs();
    wire_flush(&server.wire);
    take_frames(); /* those that had to wait for room */
}

int serve_run(int fd, const struct serve_options *options)
{
    sigset_t child_signal;

    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&child_signal);
    sigaddset(&child_signal, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child_signal, NULL);
    int signal_fd = signalfd(-1, &child_signal, SFD_CLOEXEC | SFD_NONBLOCK);

    if (signal_fd < 0)
        return errno;
    size_t files = files_allow(FILES_FIXED + POLL_PER_EXEC * PROTOCOL_EXECS_MAX);

    server.execs_max = files > FILES_FIXED ? (files - FILES_FIXED) / POLL_PER_EXEC : 0;
    server.options = options;
    wire_init(&server.wire, fd);
    send_hello();
    wire_flush(&server.wire);
    if (options->is_system)
        system_finish(options->conf);
    while (!server.wire.broken)
        serve_round(signal_fd);
    for (struct exec *exec = server.execs; exec != NULL; exec = exec->next) {
        if (!exec->exited)
            kill(-exec->pid, SIGKILL);
    }
    if (options->is_system)
        control_shutdown(RB_POWER_OFF, false);
    close(signal_fd);
    return 0;
}
