#include "blk.h"

#include <errno.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <string.h>

#include "timer.h"

enum {
	VISIT_REQUESTS = 64, /* before the worker looks at its other sources */
	SMALL_SIZE = 1 << 16,
};

static const uint32_t NO_SLOT = UINT32_MAX;

void kvl_blk_init(struct kvl_blk *blk, const struct kvl_blk_config *config, struct kvl_virtq *queue,
		  struct kvl_irq *irq, struct iovec *iov, struct kvl_uring *ring, struct kvl_blk_slot *slots)
{
	memset(blk, 0, sizeof(*blk));
	blk->config = config;
	blk->queue = queue;
	blk->irq = irq;
	blk->iov = iov;
	blk->ring = ring;
	blk->slots = slots;
	for (uint32_t i = 0; ring && i < queue->size; i++)
		slots[i].next_free = i + 1u < queue->size ? i + 1 : NO_SLOT;
}

/* Give a request back, and keep an errno for Python if it is the first of its kind. That it was cut short is no news. */
static void complete(struct kvl_blk *blk, const struct kvl_blk_request *request, const struct kvl_blk_answer *answer)
{
	uint32_t word = (uint32_t)answer->error / 64 % 3;
	uint64_t bit = UINT64_C(1) << ((uint32_t)answer->error % 64);

	kvl_blk_complete(blk->queue, request, answer);
	if (answer->error && answer->error != ECANCELED && !(blk->told[word] & bit)) {
		blk->told[word] |= bit;
		blk->error = answer->error;
	}
}

static int interrupt(struct kvl_blk *blk)
{
	int error;

	if (!kvl_virtq_needs_interrupt(blk->queue))
		return 0;
	blk->stats.interrupts++;
	error = kvl_irq_raise(blk->irq, KVL_IRQ_QUEUE);
	if (!error)
		return 0;
	blk->error = error;
	return KVL_BLK_IRQ_ERROR;
}

/* Look at the queue no more until the limiter allows it. */
static int pause_for(struct kvl_blk *blk, uint64_t wait_ns)
{
	int error;

	blk->stats.pauses++;
	__atomic_store_n(&blk->is_paused, true, __ATOMIC_RELAXED);
	kvl_worker_mask(blk->worker, blk->source, true);
	error = kvl_timer_arm(blk->timer_fd, wait_ns);
	if (!error)
		return 0;
	blk->error = error;
	return KVL_BLK_TIMER_ERROR;
}

static int resume(void *context)
{
	struct kvl_blk *blk = context;

	kvl_timer_drain(blk->timer_fd);
	kvl_worker_mask(blk->worker, blk->source, false);
	__atomic_store_n(&blk->is_paused, false, __ATOMIC_RELAXED);
	return 0;
}

/* Take the next request into (ret). False if there is none, or it broke the queue, or it has to wait for (wait_ns). */
static bool take(struct kvl_blk *blk, struct iovec *iov, struct kvl_blk_request *ret, uint64_t *wait_ns)
{
	struct kvl_limiter *limiter = blk->config->limiter;
	struct kvl_chain chain = {.iov = iov};

	*wait_ns = limiter ? kvl_limiter_wait_ns(limiter, kvl_monotonic_ns()) : 0;
	if (*wait_ns || kvl_virtq_pop(blk->queue, &chain) <= 0 || !kvl_blk_parse(blk->queue, &chain, ret))
		return false;
	if (limiter)
		kvl_limiter_take(limiter, kvl_blk_data_size(ret));
	return true;
}

/* Whether a visit goes on after so many requests. */
static bool has_time(const struct kvl_blk *blk, int done)
{
	return !done || (done < VISIT_REQUESTS && !kvl_disk_is_stopping(blk->config->disk));
}

/* After a batch: one interrupt, a wait if the limiter says so, and the code for kvl_worker_run. */
static int conclude(struct kvl_blk *blk, uint64_t wait_ns)
{
	int told = blk->error ? KVL_BLK_HOST_ERROR : 0, failed = interrupt(blk);

	if (!failed && wait_ns)
		failed = pause_for(blk, wait_ns);
	return failed ? failed : told;
}

/* Without a ring. */
static int serve_queue(void *context)
{
	struct kvl_blk *blk = context;
	uint64_t wait_ns = 0;

	blk->error = 0;
	for (int i = 0; has_time(blk, i); i++) {
		struct kvl_blk_request request;
		struct kvl_blk_answer answer;

		if (!take(blk, blk->iov, &request, &wait_ns))
			break;
		answer = kvl_blk_serve(blk->config, &blk->stats, &request);
		complete(blk, &request, &answer);
	}
	return conclude(blk, wait_ns);
}

static void prepare(struct kvl_blk *blk, uint32_t number)
{
	struct kvl_blk_slot *slot = &blk->slots[number];
	const struct kvl_disk *disk = blk->config->disk;

	switch (slot->request.type) {
	case VIRTIO_BLK_T_IN:
		kvl_uring_prepare_read(blk->ring, disk->fd, slot->left.iov, slot->left.count, slot->offset, number);
		break;
	case VIRTIO_BLK_T_OUT:
		kvl_uring_prepare_write(blk->ring, disk->fd, slot->left.iov, slot->left.count, slot->offset,
					kvl_disk_write_flags(disk, !blk->config->has_flush), number);
		break;
	default:
		kvl_uring_prepare_flush(blk->ring, disk->fd, number);
		break;
	}
}

/* Whether the ring can do it: one step's data, as nobody can stop it, in buffers that the disk takes; or a flush. */
static bool suits_ring(const struct kvl_blk *blk, const struct kvl_blk_request *request)
{
	const struct kvl_disk *disk = blk->config->disk;

	if (kvl_blk_data_size(request) > disk->step_size)
		return false;
	switch (request->type) {
	case VIRTIO_BLK_T_IN:
		return request->writable_size && kvl_disk_takes(disk, request->writable, request->writable_count);
	case VIRTIO_BLK_T_OUT:
		return request->readable_size && kvl_disk_takes(disk, request->readable, request->readable_count);
	default:
		return request->type == VIRTIO_BLK_T_FLUSH;
	}
}

/*
 * Whether a request is better done at once. In the page cache a small transfer is over before a ring could be told of it;
 * and one that is alone, with nothing behind it, gains nothing by a ring and loses a thread's wake-up where the file system
 * hands it to another.
 */
static bool is_better_alone(const struct kvl_blk *blk, const struct kvl_blk_request *request)
{
	bool is_cached = !blk->config->disk->memory_align, is_flush = request->type == VIRTIO_BLK_T_FLUSH;
	uint64_t size = kvl_blk_data_size(request);

	if (!is_flush && size <= SMALL_SIZE && is_cached)
		return true;
	if (blk->in_flight || kvl_virtq_has_chain(blk->queue))
		return false;
	return is_flush ? is_cached : size <= SMALL_SIZE;
}

/* Begin the request of a slot; false if it is done already and (ret) is the answer. */
static bool begin(struct kvl_blk *blk, uint32_t number, struct kvl_blk_answer *ret)
{
	struct kvl_blk_slot *slot = &blk->slots[number];
	struct kvl_blk_request *request = &slot->request;

	if (!suits_ring(blk, request) || is_better_alone(blk, request)) {
		*ret = kvl_blk_serve(blk->config, &blk->stats, request);
		return false;
	}
	if (!kvl_blk_admit(blk->config, &blk->stats, request, ret))
		return false;
	slot->offset = request->sector * KVL_BLK_SECTOR;
	if (request->type == VIRTIO_BLK_T_IN)
		slot->left = (struct kvl_iovecs){.iov = request->writable, .count = request->writable_count};
	else
		slot->left = (struct kvl_iovecs){.iov = request->readable, .count = request->readable_count};
	prepare(blk, number);
	blk->first_free = slot->next_free;
	__atomic_store_n(&blk->in_flight, blk->in_flight + 1, __ATOMIC_RELAXED);
	return true;
}

/* Whether an operation is to go on: it was interrupted, or did a part. Then it is prepared again. */
static bool goes_on(struct kvl_blk *blk, uint32_t number, int32_t result)
{
	struct kvl_blk_slot *slot = &blk->slots[number];

	if (result == -EINTR || result == -EAGAIN) {
		prepare(blk, number);
		return true;
	}
	if (result <= 0 || slot->request.type == VIRTIO_BLK_T_FLUSH)
		return false;
	kvl_iovecs_advance(&slot->left, (size_t)result);
	if (!slot->left.count)
		return false;
	slot->offset += (uint64_t)result;
	prepare(blk, number);
	return true;
}

static void release(struct kvl_blk *blk, uint32_t number)
{
	blk->slots[number].next_free = blk->first_free;
	blk->first_free = number;
	__atomic_store_n(&blk->in_flight, blk->in_flight - 1, __ATOMIC_RELAXED);
}

/* Answer what the ring has finished. */
static void reap(struct kvl_blk *blk)
{
	uint64_t number;
	int32_t result;

	while (kvl_uring_reap(blk->ring, &number, &result)) {
		struct kvl_blk_slot *slot = &blk->slots[number];
		struct kvl_blk_answer answer;
		int error = result < 0 ? -result : 0;

		if (goes_on(blk, (uint32_t)number, result))
			continue;
		if (!result && slot->request.type != VIRTIO_BLK_T_FLUSH)
			error = EIO; /* the file has become shorter than the disk */
		answer = kvl_blk_conclude(&blk->stats, &slot->request, error);
		complete(blk, &slot->request, &answer);
		release(blk, (uint32_t)number);
	}
}

static int submit(struct kvl_blk *blk)
{
	int error = kvl_uring_submit(blk->ring);

	if (!error)
		return 0;
	blk->error = error;
	return KVL_BLK_RING_ERROR;
}

/* With a ring: what it has finished makes room for what waits. */
static int feed_ring(void *context)
{
	struct kvl_blk *blk = context;
	uint64_t wait_ns = 0;
	int failed;

	blk->error = 0;
	reap(blk);
	for (int i = 0; has_time(blk, i) && blk->first_free != NO_SLOT; i++) {
		uint32_t number = blk->first_free;
		struct kvl_blk_slot *slot = &blk->slots[number];
		struct kvl_blk_answer answer;

		if (!take(blk, blk->iov + (uint64_t)number * blk->queue->size, &slot->request, &wait_ns))
			break;
		if (!begin(blk, number, &answer))
			complete(blk, &slot->request, &answer);
	}
	failed = submit(blk);
	return failed ? failed : conclude(blk, wait_ns);
}

/* The ring has finished something. Takes nothing from the queue, whose faults are its own source's. */
static int drain_ring(void *context)
{
	struct kvl_blk *blk = context;
	int failed;

	blk->error = 0;
	reap(blk);
	failed = submit(blk);
	return failed ? failed : conclude(blk, 0);
}

static bool ring_is_ready(const void *context)
{
	const struct kvl_blk *blk = context;

	return kvl_uring_is_ready(blk->ring);
}

int kvl_blk_add_to_worker(struct kvl_blk *blk, struct kvl_worker *worker, int kick_fd, int timer_fd)
{
	int source = kvl_worker_add_queue(worker, blk->queue, kick_fd, blk->ring ? feed_ring : serve_queue, blk);

	if (source < 0)
		return -1;
	blk->worker = worker;
	blk->source = (uint32_t)source;
	blk->timer_fd = timer_fd;
	if (blk->config->limiter && kvl_worker_add_fd(worker, timer_fd, POLLIN, resume, blk) < 0)
		return -1;
	if (!blk->ring)
		return 0;
	source = kvl_worker_add_fd(worker, blk->ring->fd, POLLIN, drain_ring, blk);
	if (source < 0)
		return -1;
	kvl_worker_watch(worker, (uint32_t)source, ring_is_ready);
	return 0;
}

void kvl_blk_abandon(struct kvl_blk *blk)
{
	/* What could not be submitted will never be finished. */
	while (blk->ring && blk->in_flight > blk->ring->prepared && !kvl_uring_wait(blk->ring)) {
		uint64_t number;
		int32_t result;

		while (kvl_uring_reap(blk->ring, &number, &result))
			release(blk, (uint32_t)number);
	}
}
