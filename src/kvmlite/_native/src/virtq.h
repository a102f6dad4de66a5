/*
 * Split virtqueues, device side (VIRTIO 1.2, 2.7), with EVENT_IDX and INDIRECT.
 *
 * A queue belongs to one thread at a time. The driver may change ring memory at any moment, so each ring field and
 * each descriptor is loaded once and only the copy is judged and used. Nothing here allocates, and no chain makes a
 * call walk more than "size" descriptors.
 */
#ifndef KVL_VIRTQ_H
#define KVL_VIRTQ_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "mem.h"

enum { KVL_VIRTQ_MAX_SIZE = 32768 };

/* What a driver can do wrong: code, value, text. One list, so that no code is without a text. */
#define KVL_ERRORS(E)                                                                                          \
	E(KVL_E_QUEUE_SIZE, -1, "queue size is not a power of two within the maximum")                         \
	E(KVL_E_RING_ALIGN, -2, "ring address is not aligned")                                                 \
	E(KVL_E_RING_RANGE, -3, "ring is not inside guest RAM")                                                \
	E(KVL_E_AVAIL_JUMP, -4, "available index runs ahead of the queue")                                     \
	E(KVL_E_OVERCOMMIT, -5, "more chains in flight than the queue has descriptors")                        \
	E(KVL_E_HEAD, -6, "chain head outside the queue")                                                      \
	E(KVL_E_DESC_INDEX, -7, "next descriptor outside its table")                                           \
	E(KVL_E_CHAIN_TOO_LONG, -8, "chain has more descriptors than the queue")                               \
	E(KVL_E_CHAIN_TOO_LARGE, -9, "chain is larger than 4 GiB")                                             \
	E(KVL_E_DESC_ORDER, -10, "readable descriptor after a writable one")                                   \
	E(KVL_E_DESC_RANGE, -11, "descriptor is not inside guest RAM")                                         \
	E(KVL_E_INDIRECT_OFF, -12, "indirect descriptor without the feature")                                  \
	E(KVL_E_INDIRECT_NEXT, -13, "indirect descriptor with a next one")                                     \
	E(KVL_E_INDIRECT_NESTED, -14, "indirect descriptor inside an indirect table")                          \
	E(KVL_E_INDIRECT_SIZE, -15, "indirect table size is not a positive multiple of 16")                    \
	E(KVL_E_INDIRECT_RANGE, -16, "indirect table is not inside guest RAM")                                 \
	E(KVL_E_REQUEST_HEADER, -17, "request is shorter than its header")                                     \
	E(KVL_E_REQUEST_STATUS, -18, "request has no room for its status")                                   \
	E(KVL_E_RX_BUFFER, -19, "receive buffer is not writable, or has no room")

#define KVL_ERROR_ENUM(name, value, text) name = value,
enum kvl_error { KVL_OK = 0, KVL_ERRORS(KVL_ERROR_ENUM) };

/* The sentence for a KVL_E_* code, without addresses; "unknown error" for any other number. */
const char *kvl_error_text(int code);

/* Where a driver put a queue. Guest-physical addresses. */
struct kvl_virtq_layout {
	uint64_t desc_gpa;  /* 16 * size bytes, 16-byte aligned */
	uint64_t avail_gpa; /* 6 + 2 * size bytes, 2-byte aligned */
	uint64_t used_gpa;  /* 6 + 8 * size bytes, 4-byte aligned */
	uint32_t size;
	bool event_idx; /* VIRTIO_F_EVENT_IDX was negotiated */
	bool indirect;  /* VIRTIO_F_INDIRECT_DESC was negotiated */
};

struct kvl_virtq {
	const struct kvl_mem *mem;
	uint8_t *desc_table; /* guest memory, as the two below */
	uint16_t *avail_ring;
	uint16_t *used_ring;
	uint16_t size;
	uint16_t last_avail_idx; /* next avail ring entry to take */
	uint16_t used_idx;       /* next used ring entry to fill */
	uint16_t signalled_used; /* used_idx when last asked about an interrupt */
	uint32_t unsignalled;    /* used entries since then; counts no further than past 65536 */
	bool event_idx;
	bool indirect;
	bool notify;          /* the driver shall tell when it adds buffers */
	int fault;            /* KVL_E_* once the driver broke the queue, for good */
	uint64_t fault_seen;  /* the offending value: an index, an address or a size ... */
	uint64_t fault_limit; /* ... and what it was held against: a limit or the size of the range */
};

/* A popped chain. Readable buffers come first in (iov), writable ones after them. */
struct kvl_chain {
	struct iovec *iov; /* room for the queue's size; the caller's */
	uint16_t head;
	uint16_t readable_count; /* iovecs */
	uint16_t writable_count;
	uint64_t readable_size; /* bytes */
	uint64_t writable_size;
};

/*
 * Check a layout against (mem) and make the queue ready for its first chain. (mem) must outlive the queue.
 * Returns KVL_OK or KVL_E_QUEUE_SIZE, KVL_E_RING_*; then every later pop returns the same code.
 */
int kvl_virtq_init(struct kvl_virtq *q, const struct kvl_mem *mem, const struct kvl_virtq_layout *layout);

/*
 * Take the next chain. Returns 1 and fills (ret); 0 if there is none, and then the driver notifies for the next one
 * unless notifications are disabled; a KVL_E_* code if the driver broke the rules, for this and every later call.
 * Descriptors of length 0 count as descriptors but yield no iovec; their address is not looked at.
 */
int kvl_virtq_pop(struct kvl_virtq *q, struct kvl_chain *ret);

/*
 * Break the queue: the driver broke a rule of the device behind it. (seen) and (limit) tell how. Returns (code), as every
 * later pop does.
 */
int kvl_virtq_fail(struct kvl_virtq *q, int code, uint64_t seen, uint64_t limit);

/* Fill (ret) with the chain that begins at (head), in flight or not; KVL_OK or a KVL_E_* code as above. */
int kvl_virtq_chain_at(struct kvl_virtq *q, uint16_t head, struct kvl_chain *ret);

/* Whether a pop would yield a chain or a fault. Asks for no notification. */
bool kvl_virtq_has_chain(const struct kvl_virtq *q);

/* Give a chain back: (written) bytes were stored in its writable part. (head) must be less than the queue's size. */
void kvl_virtq_push(struct kvl_virtq *q, uint16_t head, uint32_t written);

/*
 * Give several chains back that the driver must see at once: stage each at its place (0, 1, ...), then publish them.
 * At most as many as are in flight.
 */
void kvl_virtq_stage(struct kvl_virtq *q, uint32_t place, uint16_t head, uint32_t written);
void kvl_virtq_publish(struct kvl_virtq *q, uint32_t count);

/* Whether the driver wants an interrupt for what was pushed since the last call (2.7.7 and 2.7.10). */
bool kvl_virtq_needs_interrupt(struct kvl_virtq *q);

/* Ask the driver not to notify; it may do so all the same. */
void kvl_virtq_disable_notify(struct kvl_virtq *q);

/* Ask for notifications again; returns whether buffers are waiting already, for which none will come. */
bool kvl_virtq_enable_notify(struct kvl_virtq *q);

/* Copy between a flat buffer and (count) iovecs from (offset) bytes on; returns bytes copied, fewer at the end. */
uint64_t kvl_iov_read(const struct iovec *iov, uint32_t count, uint64_t offset, void *to, uint64_t size);
uint64_t kvl_iov_write(const struct iovec *iov, uint32_t count, uint64_t offset, const void *from, uint64_t size);

#endif
