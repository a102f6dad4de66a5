#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "agent.h"

enum {
    PIPE_SIZE = 1024 * 1024,       /* the most an unprivileged process may have */
    TTY_DRAIN_LIMIT = 128 * 1024,  /* a pty buffers less than this */
};

/* Both ends of one stream; `child` is closed in the agent once the command has it. */
struct ends {
    int agent, child;
};

static void close_fd(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void set_nonblocking(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

static bool make_pipe(struct ends *ret, bool child_reads)
{
    int fds[2];

    if (pipe2(fds, O_CLOEXEC) != 0)
        return false;
    *ret = child_reads ? (struct ends){.agent = fds[1], .child = fds[0]} : (struct ends){.agent = fds[0], .child = fds[1]};
    fcntl(ret->agent, F_SETPIPE_SZ, PIPE_SIZE); /* a smaller pipe works too */
    set_nonblocking(ret->agent);
    return true;
}

static bool make_pty(struct ends *ret, const struct exec_request *request)
{
    struct winsize size = {.ws_col = request->columns, .ws_row = request->rows};
    int unlocked = 0;

    ret->agent = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
    if (ret->agent < 0)
        return false;
    if (ioctl(ret->agent, TIOCSPTLCK, &unlocked) != 0 || ioctl(ret->agent, TIOCSWINSZ, &size) != 0)
        return false;
    ret->child = ioctl(ret->agent, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    return ret->child >= 0;
}

/* The streams of a command: in, out, err, in this order. */
static bool open_streams(const struct exec_request *request, struct ends streams[3])
{
    if (request->flags & EXEC_TTY) {
        if (!make_pty(&streams[0], request))
            return false;
        streams[1].agent = fcntl(streams[0].agent, F_DUPFD_CLOEXEC, 3);
        return streams[1].agent >= 0;
    }
    if (request->flags & EXEC_STDIN) {
        if (!make_pipe(&streams[0], true))
            return false;
    } else {
        streams[0].child = open("/dev/null", O_RDONLY | O_CLOEXEC);
        if (streams[0].child < 0)
            return false;
    }
    if (!make_pipe(&streams[1], false))
        return false;
    return (request->flags & EXEC_MERGE) || make_pipe(&streams[2], false);
}

static pid_t start_child(struct exec_request *request, const struct ends streams[3], int status_fd, const char *path)
{
    bool tty = request->flags & EXEC_TTY;
    int output = tty ? streams[0].child : streams[1].child;
    struct child_setup setup = {
        .stdin_fd = streams[0].child,
        .stdout_fd = output,
        .stderr_fd = streams[2].child >= 0 ? streams[2].child : output,
        .status_fd = status_fd,
        .tty = tty,
    };
    pid_t pid = fork();

    if (pid == 0)
        child_exec(request, &setup, path);
    return pid;
}

static struct exec *make_exec(uint32_t id, const struct exec_request *request)
{
    struct exec *exec = calloc(1, sizeof(*exec));

    if (exec == NULL)
        return NULL;
    exec->id = id;
    exec->tty = request->flags & EXEC_TTY;
    exec->stdin_newline = true;
    exec->status_fd = exec->stdin_fd = -1;
    exec->outputs[0] = (struct output){.fd = -1, .type = MESSAGE_STDOUT, .credit = request->stdout_window};
    exec->outputs[1] = (struct output){.fd = -1, .type = MESSAGE_STDERR, .credit = request->stderr_window};
    return exec;
}

static void send_failure(struct wire *wire, uint32_t id, uint32_t stage, int error)
{
    wire_send_words(wire, MESSAGE_EXEC_FAILED, id, stage, (uint32_t)error);
}

/* Start a command; NULL, after EXEC_FAILED to the host, if there is no process. STARTED follows when exec is reached. */
struct exec *exec_start(struct wire *wire, uint32_t id, struct exec_request *request, const char *default_path)
{
    struct ends streams[3] = {{-1, -1}, {-1, -1}, {-1, -1}};
    struct exec *exec = make_exec(id, request);
    int status[2] = {-1, -1}, error = 0;

    if (exec == NULL) {
        send_failure(wire, id, STAGE_SETUP, ENOMEM);
        return NULL;
    }
    if (!open_streams(request, streams) || pipe2(status, O_CLOEXEC) != 0 ||
        (exec->pid = start_child(request, streams, status[1], default_path)) < 0)
        error = errno;
    close_fd(&status[1]);
    for (int index = 0; index < 3; index++)
        close_fd(&streams[index].child);
    exec->status_fd = status[0];
    exec->stdin_fd = streams[0].agent;
    exec->stdin_credit = exec->stdin_fd >= 0 ? PROTOCOL_STDIN_WINDOW : 0;
    exec->outputs[0].fd = streams[1].agent;
    exec->outputs[1].fd = streams[2].agent;
    exec->outputs[1].is_finished = streams[2].agent < 0; /* a terminal or merged output: there is no such stream */
    if (error != 0) {
        exec_destroy(exec);
        send_failure(wire, id, STAGE_SETUP, error);
        return NULL;
    }
    set_nonblocking(exec->status_fd);
    return exec;
}

void exec_destroy(struct exec *exec)
{
    close_fd(&exec->status_fd);
    close_fd(&exec->stdin_fd);
    close_fd(&exec->outputs[0].fd);
    close_fd(&exec->outputs[1].fd);
    free(exec->stdin_ring);
    free(exec);
}

bool exec_is_finished(const struct exec *exec)
{
    return exec->exited && (exec->id == 0 || (exec->outputs[0].is_finished && exec->outputs[1].is_finished));
}

/* The status pipe: its end says that exec was reached, a struct child_failure that it was not. */
void exec_read_status(struct exec *exec, struct wire *wire)
{
    struct child_failure failure;
    ssize_t count = read(exec->status_fd, &failure, sizeof(failure));

    if (count < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    close_fd(&exec->status_fd);
    if (count != sizeof(failure)) {
        wire_send_words(wire, MESSAGE_STARTED, exec->id, (uint32_t)exec->pid, exec->stdin_credit);
        return;
    }
    send_failure(wire, exec->id, failure.stage, (int)failure.error);
    exec->id = 0;
    close_fd(&exec->stdin_fd);
    close_fd(&exec->outputs[0].fd);
    close_fd(&exec->outputs[1].fd);
}

void exec_close_stdin(struct exec *exec, struct wire *wire, bool tell_host)
{
    if (exec->stdin_fd < 0)
        return;
    close_fd(&exec->stdin_fd);
    free(exec->stdin_ring);
    exec->stdin_ring = NULL;
    exec->stdin_size = 0;
    if (tell_host)
        wire_send_words(wire, MESSAGE_CLOSE, exec->id, STREAM_STDIN, 0);
}

/* A terminal has no end of file: send its end-of-file character, twice if a line is unfinished. */
static void end_terminal_input(struct exec *exec)
{
    struct termios settings;
    char end[2];

    if (tcgetattr(exec->stdin_fd, &settings) != 0 || !(settings.c_lflag & ICANON))
        return;
    memset(end, settings.c_cc[VEOF], sizeof(end));
    ssize_t ignored __attribute__((unused)) = write(exec->stdin_fd, end, exec->stdin_newline ? 1 : 2);
}

static void end_stdin(struct exec *exec, struct wire *wire)
{
    if (exec->tty)
        end_terminal_input(exec);
    exec_close_stdin(exec, wire, false);
}

/* Bytes that have reached the pipe are the host's to send again. */
static void return_credit(struct exec *exec, struct wire *wire, size_t size)
{
    exec->stdin_unacked += (uint32_t)size;
    if (exec->stdin_unacked < PROTOCOL_STDIN_WINDOW / 4)
        return;
    wire_send_words(wire, MESSAGE_WINDOW, exec->id, STREAM_STDIN, exec->stdin_unacked);
    exec->stdin_credit += exec->stdin_unacked;
    exec->stdin_unacked = 0;
}

/* Write to the command's standard input; bytes written, 0 if it is full or was closed by the command. */
static size_t write_stdin(struct exec *exec, struct wire *wire, const uint8_t *data, size_t size)
{
    ssize_t count = write(exec->stdin_fd, data, size);

    if (count > 0) {
        exec->stdin_newline = data[count - 1] == '\n';
        return_credit(exec, wire, (size_t)count);
        return (size_t)count;
    }
    if (count < 0 && errno != EAGAIN && errno != EINTR)
        exec_close_stdin(exec, wire, true);
    return 0;
}

void exec_pump_stdin(struct exec *exec, struct wire *wire)
{
    while (exec->stdin_fd >= 0 && exec->stdin_size > 0) {
        size_t piece = PROTOCOL_STDIN_WINDOW - exec->stdin_head;

        if (piece > exec->stdin_size)
            piece = exec->stdin_size;
        size_t count = write_stdin(exec, wire, exec->stdin_ring + exec->stdin_head, piece);

        if (count == 0)
            return;
        exec->stdin_head = (exec->stdin_head + count) % PROTOCOL_STDIN_WINDOW;
        exec->stdin_size -= count;
    }
    if (exec->stdin_fd >= 0 && exec->stdin_eof)
        end_stdin(exec, wire);
}

/* Hold (size) bytes until the pipe takes them; the credit given to the host bounds them to the ring. */
static bool keep_stdin(struct exec *exec, const uint8_t *data, size_t size)
{
    if (exec->stdin_ring == NULL)
        exec->stdin_ring = malloc(PROTOCOL_STDIN_WINDOW);
    if (exec->stdin_ring == NULL)
        return false;
    size_t tail = (exec->stdin_head + exec->stdin_size) % PROTOCOL_STDIN_WINDOW;
    size_t first = PROTOCOL_STDIN_WINDOW - tail < size ? PROTOCOL_STDIN_WINDOW - tail : size;

    memcpy(exec->stdin_ring + tail, data, first);
    memcpy(exec->stdin_ring, data + first, size - first);
    exec->stdin_size += size;
    return true;
}

void exec_take_stdin(struct exec *exec, struct wire *wire, const struct frame *frame)
{
    size_t taken = 0;

    if (frame->size > exec->stdin_credit || exec->stdin_eof) {
        wire_fail(wire, "exec %u: %u bytes of stdin, %u allowed", exec->id, frame->size,
                  exec->stdin_eof ? 0 : exec->stdin_credit);
        return;
    }
    exec->stdin_credit -= frame->size;
    if (exec->stdin_fd < 0)
        return; /* the command has closed it; the host will have heard by now */
    exec->stdin_eof = frame->flags & FLAG_EOF;
    if (exec->stdin_size == 0 && frame->size > 0)
        taken = write_stdin(exec, wire, frame->payload, frame->size);
    if (exec->stdin_fd >= 0 && taken < frame->size && !keep_stdin(exec, frame->payload + taken, frame->size - taken))
        exec_close_stdin(exec, wire, true); /* out of memory: as if the command had closed it */
    exec_pump_stdin(exec, wire);
}

void exec_end_output(struct exec *exec, struct wire *wire, struct output *output)
{
    if (output->is_finished)
        return;
    close_fd(&output->fd);
    output->is_finished = true;
    wire_send(wire, output->type, FLAG_EOF, exec->id, NULL, 0);
}

/* Move one chunk from the command to the host, as far as the host's credit goes. */
void exec_pump_output(struct exec *exec, struct wire *wire, struct output *output)
{
    size_t limit = PROTOCOL_DATA_CHUNK;

    if (output->is_finished || output->credit == 0)
        return;
    if (limit > output->credit)
        limit = output->credit;
    if (output->is_bounded && limit > output->remaining)
        limit = output->remaining;
    ssize_t count = read(output->fd, wire_data_space(wire), limit);

    if (count > 0) {
        wire_data_commit(wire, output->type, 0, exec->id, (uint32_t)count);
        output->credit -= (uint32_t)count;
        output->remaining -= output->is_bounded ? (size_t)count : 0;
        if (!output->is_bounded || output->remaining > 0)
            return;
    } else if (count < 0 && (errno == EINTR || (errno == EAGAIN && !output->is_bounded))) {
        return;
    }
    exec_end_output(exec, wire, output); /* end of file, EIO of a pty whose other side is closed, or all there was */
}

/* What the command itself wrote is in the pipe by now. Anything beyond is a background process that inherited the
 * stream, and EXIT does not wait for it. */
static void bound_output(struct exec *exec, struct wire *wire, struct output *output)
{
    int available = 0;

    if (output->fd < 0)
        return;
    if (exec->tty)
        available = TTY_DRAIN_LIMIT;
    else if (ioctl(output->fd, FIONREAD, &available) != 0)
        available = 0;
    output->is_bounded = true;
    output->remaining = (size_t)available;
    if (available == 0)
        exec_end_output(exec, wire, output);
}

/* EXIT goes out at once, so that no flood of output delays it; the ends of the streams follow when they are drained. */
void exec_reaped(struct exec *exec, struct wire *wire, int wait_status)
{
    if (exec->status_fd >= 0)
        exec_read_status(exec, wire); /* the other side is closed: this does not return empty-handed */
    exec->exited = true;
    if (exec->id == 0)
        return;
    exec_close_stdin(exec, wire, false);
    if (WIFSIGNALED(wait_status))
        wire_send_words(wire, MESSAGE_EXIT, exec->id, EXIT_SIGNAL, (uint32_t)WTERMSIG(wait_status));
    else
        wire_send_words(wire, MESSAGE_EXIT, exec->id, EXIT_CODE, (uint32_t)WEXITSTATUS(wait_status));
    for (int index = 0; index < 2; index++)
        bound_output(exec, wire, &exec->outputs[index]);
}
