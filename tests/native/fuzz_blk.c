/*
 * Fuzzes a block device with the requests of a hostile driver, on a disk in memory that fails now and then.
 *
 * Inputs, see rings.h: where the queue is, 4 bytes of what the disk is like, up to 32 steps, then guest RAM. Each step is
 * a visit of the worker's, and what the driver does meanwhile. The system calls that move data are replaced by ours: a
 * byte outside guest RAM or outside the disk aborts, and so does a write to a disk that is not to be written. With a ring,
 * the host's own io_uring moves data of a real file, and what aborts is a request that gets lost.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/virtio_blk.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "blk.h"
#include "rings.h"
#include "timer.h"

enum {
	BASE_FD = 1000,
	TOP_FD = 1001,
	DISK_SIZE = 64 * 4096,
	BOUNCE_SIZE = 8192,
	STEP_SIZE = 16384,
	OPTIONS = 4,
	STEPS = 32,
};

enum {
	OPTION_READ_ONLY = 1,
	OPTION_COW = 2,
	OPTION_DIRECT = 4,
	OPTION_LIMITED = 8,
	OPTION_NO_FLUSH = 16,
	OPTION_FAILS = 32,
	OPTION_RING = 64,
	OPTION_STOPS = 128,
};

static uint8_t base[DISK_SIZE], top[DISK_SIZE], bounce_buffer[BOUNCE_SIZE] __attribute__((aligned(4096)));
static uint64_t written[DISK_SIZE / KVL_COW_CLUSTER / 64];
static uint64_t disk_size, requests, statuses[4], fail_state;
static int may_write_base, irq_fd = -1, timer_fd, ring_file;
static struct kvl_uring ring;
static int has_ring, has_overlay;
static struct kvl_disk *stopping; /* a disk that is told to stop during one of its calls, or NULL */

/* The disk has done (size) bytes at once: never more than a step. */
static void count_step(uint64_t size)
{
	require(size <= STEP_SIZE, "more than a step at a time");
	if (stopping)
		__atomic_store_n(&stopping->is_stopping, 1, __ATOMIC_RELAXED);
}

/* What a call of this disk does: 0 what it should, else an errno, or a short transfer (-1). */
static int next_failure(void)
{
	static const int kinds[] = {EINTR, EIO, ENOSPC, EOPNOTSUPP, -1, -1};

	if (!fail_state)
		return 0;
	fail_state = fail_state * 6364136223846793005u + 1442695040888963407u;
	return fail_state >> 60 < 12 ? 0 : kinds[(fail_state >> 40) % (sizeof(kinds) / sizeof(kinds[0]))];
}

static ssize_t transfer(int fd, const struct iovec *iov, int count, off_t offset, int is_write)
{
	uint8_t *disk = fd == TOP_FD ? top : base;
	uint64_t at = (uint64_t)offset, total = 0;
	int failure = next_failure();

	/* With a ring, small transfers that are alone come here. */
	require(fd == BASE_FD || fd == TOP_FD || fd == ring_file, "another descriptor");
	require(!is_write || fd == TOP_FD || may_write_base, "wrote to what is not to be written");
	require(count > 0 && count <= 1024, "a bad number of iovecs");
	if (failure > 0) {
		errno = failure;
		return -1;
	}
	for (int i = 0; i < count; i++) {
		uint64_t length = iov[i].iov_len;
		/* Bounced, zeros that are written, a cluster on its way to the overlay: the sanitizers watch those. */
		uintptr_t in_bounce = (uintptr_t)iov[i].iov_base - (uintptr_t)bounce_buffer;
		int is_ours = in_bounce < BOUNCE_SIZE ||
			      (count == 1 && (is_write || (has_overlay && length <= KVL_COW_CLUSTER)));

		require(at <= disk_size && length <= disk_size - at, "beyond the disk");
		require(is_ours || is_guest_ram(iov[i].iov_base, length), "a buffer outside guest RAM");
		if (failure == -1)
			length = length / 2 + 1;
		if (length > iov[i].iov_len)
			length = iov[i].iov_len;
		if (is_write)
			memcpy(disk + at, iov[i].iov_base, length);
		else
			memcpy(iov[i].iov_base, disk + at, length);
		at += length;
		total += length;
		if (failure == -1)
			break;
	}
	count_step(total);
	return (ssize_t)total;
}

ssize_t preadv2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	require(flags == 0, "flags of a read");
	return transfer(fd, iov, count, offset, 0);
}

ssize_t pwritev2(int fd, const struct iovec *iov, int count, off_t offset, int flags)
{
	require((flags & ~RWF_DSYNC) == 0, "flags of a write");
	return transfer(fd, iov, count, offset, 1);
}

int fallocate(int fd, int mode, off_t offset, off_t size)
{
	int failure = next_failure();

	(void)mode;
	require(fd == TOP_FD || may_write_base, "cleared what is not to be written");
	require((uint64_t)offset <= disk_size && (uint64_t)size <= disk_size - (uint64_t)offset, "cleared beyond the disk");
	if (failure > 0) {
		errno = failure;
		return -1;
	}
	count_step((uint64_t)size);
	memset((fd == TOP_FD ? top : base) + offset, 0, (size_t)size);
	return 0;
}

int fdatasync(int fd)
{
	int failure = next_failure();

	require(fd == BASE_FD || fd == ring_file, "flushed another descriptor");
	if (failure <= 0)
		return 0;
	errno = failure;
	return -1;
}

static void count_statuses(const struct kvl_blk *blk)
{
	const struct kvl_blk_stats *stats = &blk->stats;

	requests += stats->reads + stats->writes + stats->flushes + stats->others;
	statuses[VIRTIO_BLK_S_IOERR] += stats->failed;
	statuses[VIRTIO_BLK_S_UNSUPP] += stats->refused;
}

/* Once. */
static void open_host(void)
{
	irq_fd = eventfd(0, EFD_NONBLOCK);
	timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
	ring_file = memfd_create("disk", 0);
	require(irq_fd >= 0 && timer_fd >= 0 && ftruncate(ring_file, DISK_SIZE) == 0, "cannot open what is needed");
	has_ring = kvl_uring_init(&ring, MAX_SIZE) == 0;
}

/* Wait for what is in the ring; all requests are answered then. */
static void finish_ring(struct kvl_blk *blk, struct kvl_worker *worker)
{
	struct kvl_source *source = &worker->sources[worker->count - 1];

	while (blk->in_flight) {
		int code;

		require(kvl_uring_wait(&ring) == 0, "cannot wait for the ring");
		code = source->handle(source->context);
		require(code == 0 || code == KVL_BLK_HOST_ERROR, "an unexpected code of the ring");
	}
	require(blk->queue->fault || blk->queue->used_idx == blk->queue->last_avail_idx, "a request was lost in the ring");
}

/* One life of the device. Each step byte: a visit; ask for interrupts or not; the driver goes on. */
static void live(const struct kvl_virtq_layout *layout, const uint8_t *options, const uint8_t *steps, size_t count)
{
	static struct iovec iov[MAX_SIZE * MAX_SIZE + 1];
	static struct kvl_blk_slot slots[MAX_SIZE];
	static struct kvl_cow cow;
	static struct kvl_bounce bounce;
	static struct kvl_limiter limiter;
	struct kvl_disk disk = {
		.fd = BASE_FD,
		.size = DISK_SIZE - 512 * (uint64_t)(options[1] & 7),
		.step_size = STEP_SIZE,
	};
	struct kvl_blk_config config = {.disk = &disk, .block_size = KVL_BLK_SECTOR, .id = "fuzz"};
	struct kvl_worker worker;
	struct kvl_virtq q;
	struct kvl_irq irq;
	struct kvl_blk blk;
	uint32_t room;
	int uses_ring;

	if (irq_fd < 0)
		open_host();
	uses_ring = has_ring && options[0] & OPTION_RING && !(options[0] & OPTION_COW);
	if (uses_ring)
		disk.fd = ring_file;
	disk_size = disk.size;
	has_overlay = options[0] & OPTION_COW;
	config.is_read_only = options[0] & OPTION_READ_ONLY;
	config.has_flush = !(options[0] & OPTION_NO_FLUSH);
	may_write_base = !config.is_read_only && !(options[0] & OPTION_COW);
	stopping = options[0] & OPTION_STOPS ? &disk : NULL;
	fail_state = options[0] & OPTION_FAILS ? 1 + ((uint64_t)options[2] << 8 | options[3]) : 0;
	if (options[0] & OPTION_COW) {
		memset(written, 0, sizeof(written));
		kvl_cow_init(&cow, BASE_FD, TOP_FD, disk.size, written);
		disk.cow = &cow;
		disk.is_private = true;
	} else if (options[0] & OPTION_DIRECT) {
		kvl_bounce_init(&bounce, bounce_buffer, sizeof(bounce_buffer));
		disk.bounce = &bounce;
		disk.memory_align = KVL_BLK_SECTOR;
	}
	if (options[0] & OPTION_LIMITED) {
		kvl_limiter_init(&limiter);
		kvl_bucket_init(&limiter.bytes, 1u << 30, 1 << 16, kvl_monotonic_ns());
		config.limiter = &limiter;
	}
	kvl_irq_init(&irq, irq_fd);
	if (kvl_virtq_init(&q, &mem, layout))
		return;
	kvl_worker_init(&worker, -1, 0);
	room = uses_ring ? (uint32_t)q.size * q.size : q.size;
	kvl_blk_init(&blk, &config, &q, &irq, iov, uses_ring ? &ring : NULL, slots);
	require(kvl_blk_add_to_worker(&blk, &worker, -1, timer_fd) == 0, "no room in the worker");
	for (size_t i = 0; i < count && !q.fault; i++) {
		int code;

		iov[room].iov_len = 0xdead;
		if (blk.is_paused)
			code = worker.sources[1].handle(worker.sources[1].context);
		else
			code = worker.sources[0].handle(worker.sources[0].context);
		require(iov[room].iov_len == 0xdead, "wrote behind the iovecs");
require(code == 0 || (code == KVL_BLK_HOST_ERROR && blk.error > 0 && (fail_state || uses_ring)),
			"an unexpected code");
		require(uses_ring || q.fault || q.used_idx == q.last_avail_idx, "a request was not answered");
		if (steps[i] & 4)
			kvl_virtq_disable_notify(&q);
		if (steps[i] & 8)
			kvl_virtq_enable_notify(&q);
		if (steps[i] & 16)
			rings_advance(steps[i] % 4);
	}
	if (uses_ring)
		finish_ring(&blk, &worker);
	stopping = NULL;
	count_statuses(&blk);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct rings_input input;

	if (rings_take_input(data, size, OPTIONS, STEPS, &input))
		live(&input.layout, input.options, input.steps, input.count);
	return 0;
}

#ifndef KVL_LIBFUZZER

/* A request where descriptors may point: headers, and the segments of discards behind them. */
static void draw_headers(void)
{
	static const uint32_t types[] = {VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
					 VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES};

	for (unsigned i = 0; i < 64; i++) {
		uint8_t *at = mem.regions[0].hva + BUFFERS_GPA + 64 * i;

		put(at, draw(20) ? types[draw(6)] : draw(32), 4);
		put(at + 8, draw(10) ? draw(DISK_SIZE / 512) : UINT64_MAX - draw(9), 8);
		for (unsigned part = 1; part < 4; part++) {
			put(at + 16 * part, draw(10) ? draw(DISK_SIZE / 512) : UINT64_MAX - draw(9), 8);
			put(at + 16 * part + 8, draw(10) ? draw(64) : UINT32_MAX - draw(9), 4);
			put(at + 16 * part + 12, draw(3), 4);
		}
	}
}

/* A chain as a block driver makes it: header, data, status. */
static void draw_request(uint32_t index)
{
	uint8_t *at = mem.regions[0].hva + DESC_GPA + 16 * index;
	uint32_t type = draw(2), size = 512 * (1 + draw(16));

	put(at, BUFFERS_GPA + 64 * (uint64_t)draw(64), 8);
	put(at + 8, draw(30) ? 16 * (1 + draw(4)) : draw(64), 4);
	put(at + 12, 1, 2);
	put(at + 14, index + 1, 2);
	put(at + 16, HIGH_GPA + draw(0x4000), 8);
	put(at + 24, draw(10) ? size : draw(size), 4);
	put(at + 28, 1u | (type ? 2u : 0u), 2);
	put(at + 30, index + 2, 2);
	put(at + 32, HIGH_GPA + 0x7000 + draw(64), 8);
	put(at + 40, 1, 4);
	put(at + 44, 2, 2);
	put(at + 46, 0, 2);
}

/* Rings full of such requests, and at times a byte of them broken. */
static void draw_requests(struct kvl_virtq_layout *layout)
{
	uint8_t *avail = mem.regions[0].hva + AVAIL_GPA;

	layout->desc_gpa = DESC_GPA;
	layout->avail_gpa = AVAIL_GPA;
	layout->used_gpa = USED_GPA;
	layout->size = 16;
	for (uint32_t index = 0; index < 5; index++)
		draw_request(3 * index);
	for (uint32_t i = 0; i < 16; i++)
		put(avail + 4 + 2 * i, 3 * draw(5), 2);
	put(avail + 2, draw(6), 2);
	if (draw(3) == 0)
		mem.regions[0].hva[DESC_GPA + draw(AVAIL_GPA + 64 - DESC_GPA)] = (uint8_t)draw(256);
}

int main(int argc, char **argv)
{
	struct rings_run run;

	rings_run_begin(&run, argc, argv);
	while (rings_run_next(&run, requests)) {
		struct kvl_virtq_layout layout = rings_draw();
		uint8_t steps[STEPS], options[OPTIONS];

		draw_headers();
		if (draw(4))
			draw_requests(&layout);
		for (unsigned step = 0; step < STEPS; step++)
			steps[step] = (uint8_t)draw(256);
		for (unsigned option = 0; option < OPTIONS; option++)
			options[option] = (uint8_t)draw(256);
		live(&layout, options, steps, STEPS);
	}
	rings_run_end(&run);
	printf("%llu %llu %llu\n", (unsigned long long)requests, (unsigned long long)statuses[VIRTIO_BLK_S_IOERR],
	       (unsigned long long)statuses[VIRTIO_BLK_S_UNSUPP]);
	return 0;
}
#endif
