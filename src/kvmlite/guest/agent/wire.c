#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

struct header {
    uint32_t size;
    uint8_t type, flags;
    uint16_t zero;
    uint32_t id;
};
_Static_assert(sizeof(struct header) == PROTOCOL_HEADER_SIZE, "the header has no padding");

void wire_init(struct wire *wire, int fd)
{
    wire->fd = fd;
    wire->broken = wire->stalled = false;
    wire->in_head = wire->in_tail = wire->out_head = wire->out_tail = 0;
}

void wire_fill(struct wire *wire)
{
    size_t held = wire->in_tail - wire->in_head;

    if (wire->in_head > 0) {
        memmove(wire->in, wire->in + wire->in_head, held);
        wire->in_head = 0;
        wire->in_tail = held;
    }
    if (held == sizeof(wire->in))
        return;
    ssize_t count = read(wire->fd, wire->in + held, sizeof(wire->in) - held);

    if (count > 0)
        wire->in_tail += (size_t)count;
    else if (count == 0 || (errno != EAGAIN && errno != EINTR))
        wire->broken = true;
}

bool wire_next(struct wire *wire, struct frame *ret)
{
    struct header header;
    size_t held = wire->in_tail - wire->in_head;

    if (wire->broken || held < sizeof(header))
        return false;
    memcpy(&header, wire->in + wire->in_head, sizeof(header));
    *ret = (struct frame){
        .type = header.type,
        .flags = header.flags,
        .id = le32toh(header.id),
        .size = le32toh(header.size),
        .payload = wire->in + wire->in_head + sizeof(header),
    };
    if (ret->size > PROTOCOL_PAYLOAD_MAX || header.zero != 0) {
        wire_fail(wire, "bad frame header: size %u, type %u", ret->size, ret->type);
        return false;
    }
    if (held < sizeof(header) + ret->size)
        return false;
    wire->in_head += sizeof(header) + ret->size;
    return true;
}

size_t wire_unsent(const struct wire *wire)
{
    return wire->out_tail - wire->out_head;
}

void wire_flush(struct wire *wire)
{
    wire->stalled = false;
    while (!wire->broken && wire->out_head < wire->out_tail) {
        ssize_t count = write(wire->fd, wire->out + wire->out_head, wire->out_tail - wire->out_head);

        if (count > 0) {
            wire->out_head += (size_t)count;
        } else if (count < 0 && errno == EAGAIN) {
            wire->stalled = true;
            return;
        } else if (count == 0 || errno != EINTR) {
            wire->broken = true;
        }
    }
    wire->out_head = wire->out_tail = 0;
}

/* Room for one frame with (size) bytes of payload behind what is unsent. The limits in agent.h keep the buffer from
 * ever being full: at most WIRE_REPLY_LIMIT of replies, one data chunk and a few words for each command. */
static uint8_t *frame_space(struct wire *wire, size_t size)
{
    size_t needed = sizeof(struct header) + size;

    if (sizeof(wire->out) - wire->out_tail < needed) {
        size_t unsent = wire_unsent(wire);

        memmove(wire->out, wire->out + wire->out_head, unsent);
        wire->out_head = 0;
        wire->out_tail = unsent;
    }
    if (sizeof(wire->out) - wire->out_tail < needed) {
        log_line("output buffer full: %zu bytes unsent", wire_unsent(wire));
        abort();
    }
    return wire->out + wire->out_tail + sizeof(struct header);
}

uint8_t *wire_data_space(struct wire *wire)
{
    return frame_space(wire, PROTOCOL_DATA_CHUNK);
}

void wire_data_commit(struct wire *wire, uint8_t type, uint8_t flags, uint32_t id, uint32_t size)
{
    struct header header = {.size = htole32(size), .type = type, .flags = flags, .id = htole32(id)};

    memcpy(wire->out + wire->out_tail, &header, sizeof(header));
    wire->out_tail += sizeof(header) + size;
}

void wire_send(struct wire *wire, uint8_t type, uint8_t flags, uint32_t id, const void *payload, uint32_t size)
{
    uint8_t *space = frame_space(wire, size);

    if (size > 0)
        memcpy(space, payload, size);
    wire_data_commit(wire, type, flags, id, size);
}

void wire_send_words(struct wire *wire, uint8_t type, uint32_t id, uint32_t first, uint32_t second)
{
    uint32_t words[2] = {htole32(first), htole32(second)};

    wire_send(wire, type, 0, id, words, sizeof(words));
}

/* The host broke the protocol: say so, as far as the stream takes it at once, and end. */
void wire_fail(struct wire *wire, const char *format, ...)
{
    char text[256];
    va_list arguments;

    va_start(arguments, format);
    int size = vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    log_line("%s", text);
    if (size > 0 && !wire->broken) {
        wire_send(wire, MESSAGE_ERROR, 0, 0, text, (uint32_t)strlen(text));
        wire_flush(wire);
    }
    wire->broken = true;
}
