#define _GNU_SOURCE
#include "uring.h"

#include <errno.h>
#include <linux/io_uring.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *map(int fd, uint64_t size, off_t offset)
{
	void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, offset);

	return at == MAP_FAILED ? NULL : at;
}

static uint32_t *field(const struct kvl_uring *ring, uint32_t offset)
{
	return (uint32_t *)(void *)((uint8_t *)ring->rings + offset);
}

int kvl_uring_init(struct kvl_uring *ring, uint32_t entries)
{
	struct io_uring_params params = {0};
	uint64_t sq_size, cq_size;
	uint32_t *array;

	memset(ring, 0, sizeof(*ring));
	ring->fd = (int)syscall(SYS_io_uring_setup, entries, &params);
	if (ring->fd < 0)
		return errno;
	/* One mapping for both rings, iovecs copied at submission: kernel 5.5. */
	if (!(params.features & IORING_FEAT_SINGLE_MMAP) || !(params.features & IORING_FEAT_SUBMIT_STABLE)) {
		kvl_uring_deinit(ring);
		return ENOSYS;
	}
	sq_size = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
	cq_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
	ring->rings_size = sq_size > cq_size ? sq_size : cq_size;
	ring->sqes_size = params.sq_entries * sizeof(struct io_uring_sqe);
	ring->rings = map(ring->fd, ring->rings_size, IORING_OFF_SQ_RING);
	if (ring->rings)
		ring->sqes = map(ring->fd, ring->sqes_size, IORING_OFF_SQES);
	if (!ring->sqes) {
		kvl_uring_deinit(ring);
		return ENOMEM;
	}
	ring->sq_tail = field(ring, params.sq_off.tail);
	ring->cq_head = field(ring, params.cq_off.head);
	ring->cq_tail = field(ring, params.cq_off.tail);
	ring->sq_mask = params.sq_entries - 1;
	ring->cq_mask = params.cq_entries - 1;
	ring->cqes = (struct io_uring_cqe *)(void *)((uint8_t *)ring->rings + params.cq_off.cqes);
	array = field(ring, params.sq_off.array);
	for (uint32_t i = 0; i < params.sq_entries; i++)
		array[i] = i; /* entry n is always the one of slot n */
	return 0;
}

void kvl_uring_deinit(struct kvl_uring *ring)
{
	if (ring->sqes)
		munmap(ring->sqes, ring->sqes_size);
	if (ring->rings)
		munmap(ring->rings, ring->rings_size);
	if (ring->fd >= 0)
		close(ring->fd);
	memset(ring, 0, sizeof(*ring));
	ring->fd = -1;
}

static struct io_uring_sqe *prepare(struct kvl_uring *ring, uint8_t opcode, int fd, uint64_t id)
{
	/* Only we write the tail; the kernel sees it at the submission. */
	struct io_uring_sqe *sqe = &ring->sqes[(*ring->sq_tail + ring->prepared) & ring->sq_mask];

	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = opcode;
	sqe->fd = fd;
	sqe->user_data = id;
	ring->prepared++;
	return sqe;
}

void kvl_uring_prepare_read(struct kvl_uring *ring, int fd, struct iovec *iov, uint32_t count, uint64_t offset,
			    uint64_t id)
{
	struct io_uring_sqe *sqe = prepare(ring, IORING_OP_READV, fd, id);

	sqe->addr = (uintptr_t)iov;
	sqe->len = count;
	sqe->off = offset;
}

void kvl_uring_prepare_write(struct kvl_uring *ring, int fd, struct iovec *iov, uint32_t count, uint64_t offset,
			     int flags, uint64_t id)
{
	struct io_uring_sqe *sqe = prepare(ring, IORING_OP_WRITEV, fd, id);

	sqe->addr = (uintptr_t)iov;
	sqe->len = count;
	sqe->off = offset;
	sqe->rw_flags = (uint32_t)flags;
}

void kvl_uring_prepare_flush(struct kvl_uring *ring, int fd, uint64_t id)
{
	struct io_uring_sqe *sqe = prepare(ring, IORING_OP_FSYNC, fd, id);

	sqe->fsync_flags = IORING_FSYNC_DATASYNC;
}

static int enter(const struct kvl_uring *ring, uint32_t count, uint32_t wanted, uint32_t flags)
{
	return (int)syscall(SYS_io_uring_enter, ring->fd, count, wanted, flags, NULL, 0);
}

int kvl_uring_submit(struct kvl_uring *ring)
{
	/* Release: the kernel sees the entries before the tail. */
	__atomic_store_n(ring->sq_tail, *ring->sq_tail + ring->prepared, __ATOMIC_RELEASE);
	while (ring->prepared) {
		int done = enter(ring, ring->prepared, 0, 0);

		if (done < 0 && (errno == EINTR || errno == EAGAIN || errno == EBUSY))
			continue;
		if (done < 0)
			return errno;
		ring->prepared -= (uint32_t)done;
	}
	return 0;
}

bool kvl_uring_is_ready(const struct kvl_uring *ring)
{
	/* Acquire: pairs with the kernel's release of the tail. */
	return __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE) != *ring->cq_head;
}

bool kvl_uring_reap(struct kvl_uring *ring, uint64_t *id, int32_t *result)
{
	const struct io_uring_cqe *cqe;

	if (!kvl_uring_is_ready(ring))
		return false;
	cqe = &ring->cqes[*ring->cq_head & ring->cq_mask];
	*id = cqe->user_data;
	*result = cqe->res;
	__atomic_store_n(ring->cq_head, *ring->cq_head + 1, __ATOMIC_RELEASE);
	return true;
}

int kvl_uring_wait(struct kvl_uring *ring)
{
	while (!kvl_uring_is_ready(ring)) {
		if (enter(ring, 0, 1, IORING_ENTER_GETEVENTS) < 0 && errno != EINTR)
			return errno;
	}
	return 0;
}
