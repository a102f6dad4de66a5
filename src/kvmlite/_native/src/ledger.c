#include "ledger.h"

#include <endian.h>
#include <string.h>
#include <unistd.h>

enum {
	/* Offsets in units of le16, as in virtq.c. */
	RING_IDX = 1,
	RING_ENTRIES = 2,
};

void kvl_ledger_init(struct kvl_ledger *ledger, const struct kvl_virtq *queue, uint8_t *open, uint16_t idx, int call_fd,
		     int irq_fd)
{
	*ledger = (struct kvl_ledger){
		.queue = queue,
		.open = open,
		.call_fd = call_fd,
		.irq_fd = irq_fd,
		.avail_idx = idx,
		.used_idx = idx,
	};
	memset(open, 0, queue->size);
}

/* Pairs with the release of whoever writes the index: entries below it are visible after this load. */
static uint16_t load_idx(const uint16_t *ring)
{
	return le16toh(__atomic_load_n(&ring[RING_IDX], __ATOMIC_ACQUIRE));
}

static void count_avail(struct kvl_ledger *ledger, uint16_t end)
{
	const struct kvl_virtq *q = ledger->queue;

	for (; ledger->avail_idx != end; ledger->avail_idx++) {
		uint32_t slot = ledger->avail_idx & (uint32_t)(q->size - 1);
		uint16_t head = le16toh(__atomic_load_n(&q->avail_ring[RING_ENTRIES + slot], __ATOMIC_RELAXED));

		if (head < q->size)
			ledger->open[head]++;
	}
}

static void count_used(struct kvl_ledger *ledger, uint16_t end)
{
	const struct kvl_virtq *q = ledger->queue;

	for (; ledger->used_idx != end; ledger->used_idx++) {
		uint32_t slot = ledger->used_idx & (uint32_t)(q->size - 1);
		const uint32_t *entry = (const uint32_t *)(const void *)&q->used_ring[RING_ENTRIES + 4 * slot];
		uint32_t head = le32toh(__atomic_load_n(entry, __ATOMIC_RELAXED));

		if (head < q->size)
			ledger->open[head]--;
	}
}

void kvl_ledger_update(struct kvl_ledger *ledger)
{
	const struct kvl_virtq *q = ledger->queue;
	uint16_t first_avail = ledger->avail_idx, first_used = ledger->used_idx;
	/* Used before avail: what is seen as given back is seen as offered, too. */
	uint16_t used = load_idx(q->used_ring), avail = load_idx(q->avail_ring);

	if (avail == used) {
		memset(ledger->open, 0, q->size);
		ledger->avail_idx = ledger->used_idx = avail;
		ledger->is_lost = false;
		return;
	}
	if ((uint16_t)(avail - first_avail) > q->size || (uint16_t)(used - first_used) > q->size)
		ledger->is_lost = true;
	if (ledger->is_lost) {
		ledger->avail_idx = avail;
		ledger->used_idx = used;
		return;
	}
	count_avail(ledger, avail);
	count_used(ledger, used);
	/* Entries that were written over while they were read, however unlikely. */
	__atomic_thread_fence(__ATOMIC_ACQUIRE);
	if ((uint16_t)(load_idx(q->avail_ring) - first_avail) > q->size ||
	    (uint16_t)(load_idx(q->used_ring) - first_used) > q->size)
		ledger->is_lost = true;
}

static int relay(void *context)
{
	struct kvl_ledger *ledger = context;
	uint64_t count;

	if (read(ledger->call_fd, &count, sizeof(count)) < 0)
		return 0; /* EAGAIN: nothing was signalled after all */
	kvl_ledger_update(ledger);
	count = 1;
	/* EAGAIN is an interrupt that waits already. */
	if (write(ledger->irq_fd, &count, sizeof(count)) < 0)
		return 0;
	return 0;
}

int kvl_ledger_add_to_worker(struct kvl_ledger *ledger, struct kvl_worker *worker)
{
	return kvl_worker_add_fd(worker, ledger->call_fd, POLLIN, relay, ledger);
}
