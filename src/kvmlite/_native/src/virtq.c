#include "virtq.h"

#include <endian.h>
#include <linux/virtio_ring.h>
#include <string.h>

/* A chain carries at most 2^32 bytes (2.7.5.1). */
static const uint64_t MAX_CHAIN_SIZE = UINT64_C(1) << 32;

enum {
	DESC_SIZE = sizeof(struct vring_desc),
	/* Offsets in units of le16. */
	RING_FLAGS = 0,
	RING_IDX = 1,
	RING_ENTRIES = 2,
};

const char *kvl_error_text(int code)
{
#define KVL_ERROR_CASE(name, value, text) \
	case name:                        \
		return text;
	switch (code) {
		KVL_ERRORS(KVL_ERROR_CASE)
	default:
		return "unknown error";
	}
}

int kvl_virtq_fail(struct kvl_virtq *q, int code, uint64_t seen, uint64_t limit)
{
	q->fault = code;
	q->fault_seen = seen;
	q->fault_limit = limit;
	return code;
}

static uint16_t load_relaxed(const uint16_t *from)
{
	return le16toh(__atomic_load_n(from, __ATOMIC_RELAXED));
}

static void store_relaxed(uint16_t *to, uint16_t value)
{
	__atomic_store_n(to, htole16(value), __ATOMIC_RELAXED);
}

/* Pairs with the driver's release of avail->idx: entries and descriptors below it are visible after this load. */
static uint16_t load_avail_idx(const struct kvl_virtq *q)
{
	return le16toh(__atomic_load_n(&q->avail_ring[RING_IDX], __ATOMIC_ACQUIRE));
}

/* The driver's wish for interrupts lies behind the avail ring, ours for notifications behind the used ring. */
static uint16_t *used_event(const struct kvl_virtq *q)
{
	return &q->avail_ring[RING_ENTRIES + q->size];
}

static uint16_t *avail_event(const struct kvl_virtq *q)
{
	return &q->used_ring[RING_ENTRIES + 4 * (uint32_t)q->size];
}

static void *ring_at(struct kvl_virtq *q, uint64_t gpa, uint64_t size, uint64_t align)
{
	void *hva;

	if (gpa % align) {
		kvl_virtq_fail(q, KVL_E_RING_ALIGN, gpa, align);
		return NULL;
	}
	hva = kvl_mem_at(q->mem, gpa, size);
	if (!hva)
		kvl_virtq_fail(q, KVL_E_RING_RANGE, gpa, size);
	return hva;
}

int kvl_virtq_init(struct kvl_virtq *q, const struct kvl_mem *mem, const struct kvl_virtq_layout *layout)
{
	uint64_t size = layout->size;

	memset(q, 0, sizeof(*q));
	q->mem = mem;
	q->event_idx = layout->event_idx;
	q->indirect = layout->indirect;
	q->notify = true;
	if (size == 0 || size > KVL_VIRTQ_MAX_SIZE || (size & (size - 1)))
		return kvl_virtq_fail(q, KVL_E_QUEUE_SIZE, size, KVL_VIRTQ_MAX_SIZE);
	q->size = (uint16_t)size;
	q->desc_table = ring_at(q, layout->desc_gpa, DESC_SIZE * size, VRING_DESC_ALIGN_SIZE);
	if (q->desc_table)
		q->avail_ring = ring_at(q, layout->avail_gpa, 6 + 2 * size, VRING_AVAIL_ALIGN_SIZE);
	if (q->avail_ring)
		q->used_ring = ring_at(q, layout->used_gpa, 6 + 8 * size, VRING_USED_ALIGN_SIZE);
	return q->fault;
}

/* An indirect table may have any alignment. */
struct unaligned_le64 {
	uint64_t value;
} __attribute__((packed, may_alias));

/* Copy a descriptor once. SAFETY: volatile keeps the compiler from loading it again after it was judged. */
static struct vring_desc load_desc(const uint8_t *table, uint32_t index)
{
	const volatile struct unaligned_le64 *from = (const void *)(table + (uint64_t)DESC_SIZE * index);
	uint64_t addr = le64toh(from[0].value);
	uint64_t rest = le64toh(from[1].value);

	return (struct vring_desc){
		.addr = addr,
		.len = (uint32_t)rest,
		.flags = (uint16_t)(rest >> 32),
		.next = (uint16_t)(rest >> 48),
	};
}

static int add_buffer(struct kvl_virtq *q, const struct vring_desc *desc, bool *has_writable, struct kvl_chain *ret)
{
	uint64_t total = ret->readable_size + ret->writable_size + desc->len;
	bool writable = desc->flags & VRING_DESC_F_WRITE;
	struct iovec *iov = &ret->iov[ret->readable_count + ret->writable_count];

	if (*has_writable && !writable)
		return kvl_virtq_fail(q, KVL_E_DESC_ORDER, desc->addr, desc->len);
	*has_writable = writable;
	if (total > MAX_CHAIN_SIZE)
		return kvl_virtq_fail(q, KVL_E_CHAIN_TOO_LARGE, total, MAX_CHAIN_SIZE);
	if (desc->len == 0)
		return KVL_OK;
	iov->iov_base = kvl_mem_at(q->mem, desc->addr, desc->len);
	iov->iov_len = desc->len;
	if (!iov->iov_base)
		return kvl_virtq_fail(q, KVL_E_DESC_RANGE, desc->addr, desc->len);
	if (writable) {
		ret->writable_count++;
		ret->writable_size += desc->len;
	} else {
		ret->readable_count++;
		ret->readable_size += desc->len;
	}
	return KVL_OK;
}

/* Checks of 2.7.5.3 on a descriptor that refers to a table; its WRITE flag means nothing. */
static int check_indirect(struct kvl_virtq *q, const struct vring_desc *desc, bool nested)
{
	if (!q->indirect)
		return kvl_virtq_fail(q, KVL_E_INDIRECT_OFF, desc->flags, 0);
	if (nested)
		return kvl_virtq_fail(q, KVL_E_INDIRECT_NESTED, desc->addr, desc->len);
	if (desc->flags & VRING_DESC_F_NEXT)
		return kvl_virtq_fail(q, KVL_E_INDIRECT_NEXT, desc->next, 0);
	if (desc->len == 0 || desc->len % DESC_SIZE)
		return kvl_virtq_fail(q, KVL_E_INDIRECT_SIZE, desc->len, DESC_SIZE);
	return KVL_OK;
}

static int walk(struct kvl_virtq *q, uint16_t head, struct kvl_chain *ret)
{
	const uint8_t *table = q->desc_table;
	uint32_t count = q->size, index = head, walked = 0;
	bool nested = false, has_writable = false;

	for (;;) {
		struct vring_desc desc = load_desc(table, index);
		int code;

		if (desc.flags & VRING_DESC_F_INDIRECT) {
			code = check_indirect(q, &desc, nested);
			if (code)
				return code;
			table = kvl_mem_at(q->mem, desc.addr, desc.len);
			if (!table)
				return kvl_virtq_fail(q, KVL_E_INDIRECT_RANGE, desc.addr, desc.len);
			count = desc.len / DESC_SIZE;
			index = 0;
			nested = true;
			continue; /* at most once: a table inside a table is refused */
		}
		if (++walked > q->size)
			return kvl_virtq_fail(q, KVL_E_CHAIN_TOO_LONG, walked, q->size);
		code = add_buffer(q, &desc, &has_writable, ret);
		if (code || !(desc.flags & VRING_DESC_F_NEXT))
			return code;
		index = desc.next;
		if (index >= count)
			return kvl_virtq_fail(q, KVL_E_DESC_INDEX, index, count);
	}
}

/* Ask for a notification at the next buffer; returns whether one came in before the driver could see that. */
static bool arm(struct kvl_virtq *q)
{
	if (q->event_idx)
		store_relaxed(avail_event(q), q->last_avail_idx);
	/* Store before load; pairs with the driver's barrier between avail->idx and avail_event or used->flags. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return load_avail_idx(q) != q->last_avail_idx;
}

int kvl_virtq_chain_at(struct kvl_virtq *q, uint16_t head, struct kvl_chain *ret)
{
	if (q->fault)
		return q->fault;
	if (head >= q->size)
		return kvl_virtq_fail(q, KVL_E_HEAD, head, q->size);
	ret->head = head;
	ret->readable_count = ret->writable_count = 0;
	ret->readable_size = ret->writable_size = 0;
	return walk(q, head, ret);
}

int kvl_virtq_pop(struct kvl_virtq *q, struct kvl_chain *ret)
{
	uint16_t head, waiting;
	int code;

	if (q->fault)
		return q->fault;
	waiting = (uint16_t)(load_avail_idx(q) - q->last_avail_idx);
	if (waiting == 0) {
		if (!q->notify || !arm(q))
			return 0;
		waiting = (uint16_t)(load_avail_idx(q) - q->last_avail_idx);
	}
	if (waiting > q->size)
		return kvl_virtq_fail(q, KVL_E_AVAIL_JUMP, waiting, q->size);
	if ((uint16_t)(q->last_avail_idx - q->used_idx) >= q->size)
		return kvl_virtq_fail(q, KVL_E_OVERCOMMIT, (uint64_t)q->size + 1, q->size);
	head = load_relaxed(&q->avail_ring[RING_ENTRIES + (q->last_avail_idx & (q->size - 1))]);
	code = kvl_virtq_chain_at(q, head, ret);
	if (code)
		return code;
	q->last_avail_idx++;
	return 1;
}

bool kvl_virtq_has_chain(const struct kvl_virtq *q)
{
	return !q->fault && load_avail_idx(q) != q->last_avail_idx;
}

void kvl_virtq_stage(struct kvl_virtq *q, uint32_t place, uint16_t head, uint32_t written)
{
	uint32_t slot = (q->used_idx + place) & (uint32_t)(q->size - 1);
	uint32_t *entry = (uint32_t *)(void *)&q->used_ring[RING_ENTRIES + 4 * slot];

	__atomic_store_n(&entry[0], htole32(head), __ATOMIC_RELAXED);
	__atomic_store_n(&entry[1], htole32(written), __ATOMIC_RELAXED);
}

void kvl_virtq_publish(struct kvl_virtq *q, uint32_t count)
{
	q->used_idx = (uint16_t)(q->used_idx + count);
	if (q->unsignalled < 65536)
		q->unsignalled += count;
	/* Pairs with the driver's read barrier after used->idx: it sees the entry and the buffers written before. */
	__atomic_store_n(&q->used_ring[RING_IDX], htole16(q->used_idx), __ATOMIC_RELEASE);
}

void kvl_virtq_push(struct kvl_virtq *q, uint16_t head, uint32_t written)
{
	kvl_virtq_stage(q, 0, head, written);
	kvl_virtq_publish(q, 1);
}

bool kvl_virtq_needs_interrupt(struct kvl_virtq *q)
{
	uint16_t old = q->signalled_used, now = q->used_idx, event;
	uint32_t pushed = q->unsignalled;

	if (pushed == 0)
		return false;
	q->signalled_used = now;
	q->unsignalled = 0;
	/* Store of used->idx before load; pairs with the driver's barrier between used_event and its check of used->idx. */
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	if (!q->event_idx)
		return !(load_relaxed(&q->avail_ring[RING_FLAGS]) & VRING_AVAIL_F_NO_INTERRUPT);
	if (pushed >= 65536)
		return true; /* used_idx went all the way round: it has passed any used_event */
	event = load_relaxed(used_event(q));
	return (uint16_t)(now - event - 1) < (uint16_t)(now - old);
}

void kvl_virtq_disable_notify(struct kvl_virtq *q)
{
	q->notify = false;
	if (!q->event_idx && !q->fault)
		store_relaxed(&q->used_ring[RING_FLAGS], VRING_USED_F_NO_NOTIFY);
}

bool kvl_virtq_enable_notify(struct kvl_virtq *q)
{
	q->notify = true;
	if (q->fault)
		return false;
	if (!q->event_idx)
		store_relaxed(&q->used_ring[RING_FLAGS], 0);
	return arm(q);
}

/* Copy (size) bytes from (offset) of the iovecs on; (flat) is read or written. */
static uint64_t iov_copy(const struct iovec *iov, uint32_t count, uint64_t offset, uint8_t *flat, uint64_t size,
			 bool to_iov)
{
	uint64_t done = 0;

	for (uint32_t i = 0; i < count && done < size; i++) {
		uint64_t length = iov[i].iov_len;
		uint8_t *base = iov[i].iov_base;

		if (offset >= length) {
			offset -= length;
			continue;
		}
		length -= offset;
		if (length > size - done)
			length = size - done;
		if (to_iov)
			memcpy(base + offset, flat + done, length);
		else
			memcpy(flat + done, base + offset, length);
		done += length;
		offset = 0;
	}
	return done;
}

uint64_t kvl_iov_read(const struct iovec *iov, uint32_t count, uint64_t offset, void *to, uint64_t size)
{
	return iov_copy(iov, count, offset, to, size, false);
}

uint64_t kvl_iov_write(const struct iovec *iov, uint32_t count, uint64_t offset, const void *from, uint64_t size)
{
	/* SAFETY: with to_iov set, the flat buffer is only read. */
	return iov_copy(iov, count, offset, (uint8_t *)(uintptr_t)from, size, true);
}
