#include <endian.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <termios.h>

#include "agent.h"

static struct output *find_output(struct exec *exec, uint32_t stream)
{
    return stream == STREAM_STDOUT ? &exec->outputs[0] : stream == STREAM_STDERR ? &exec->outputs[1] : NULL;
}

/* WINDOW and CLOSE: 0 le32 stream / 4 le32 bytes. Late ones, for a stream or command that has ended, are no error. */
static void take_stream_control(struct exec *exec, struct wire *wire, const struct frame *frame)
{
    uint32_t words[2];

    if (frame->size != sizeof(words)) {
        wire_fail(wire, "message %u of %u bytes", frame->type, frame->size);
        return;
    }
    memcpy(words, frame->payload, sizeof(words));
    struct output *output = find_output(exec, le32toh(words[0]));

    if (output == NULL)
        wire_fail(wire, "message %u: stream %u", frame->type, le32toh(words[0]));
    else if (frame->type == MESSAGE_CLOSE)
        exec_end_output(exec, wire, output);
    else if (__builtin_add_overflow(output->credit, le32toh(words[1]), &output->credit))
        wire_fail(wire, "exec %u: credit overflow", exec->id);
}

static void take_signal(const struct exec *exec, struct wire *wire, const struct frame *frame)
{
    uint32_t number;

    if (frame->size != sizeof(number)) {
        wire_fail(wire, "signal of %u bytes", frame->size);
        return;
    }
    memcpy(&number, frame->payload, sizeof(number));
    if (!exec->exited && le32toh(number) > 0 && le32toh(number) < NSIG && kill(-exec->pid, (int)le32toh(number)) != 0)
        kill(exec->pid, (int)le32toh(number)); /* not yet its own session */
}

/* 0 le16 columns / 2 le16 rows. */
static void take_window_size(const struct exec *exec, struct wire *wire, const struct frame *frame)
{
    uint16_t cells[2];

    if (frame->size != sizeof(cells)) {
        wire_fail(wire, "window size of %u bytes", frame->size);
        return;
    }
    memcpy(cells, frame->payload, sizeof(cells));
    struct winsize size = {.ws_col = le16toh(cells[0]), .ws_row = le16toh(cells[1])};

    if (exec->tty && exec->outputs[0].fd >= 0 && ioctl(exec->outputs[0].fd, TIOCSWINSZ, &size) != 0)
        log_line("exec %u: TIOCSWINSZ: %s", exec->id, strerror(errno));
}

void exec_take_message(struct exec *exec, struct wire *wire, const struct frame *frame)
{
    switch (frame->type) {
    case MESSAGE_STDIN:
        exec_take_stdin(exec, wire, frame);
        break;
    case MESSAGE_WINDOW:
    case MESSAGE_CLOSE:
        take_stream_control(exec, wire, frame);
        break;
    case MESSAGE_SIGNAL:
        take_signal(exec, wire, frame);
        break;
    default:
        take_window_size(exec, wire, frame);
        break;
    }
}
