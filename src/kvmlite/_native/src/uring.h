/*
 * io_uring(7), as much of it as a queue of a disk needs: transfers and flushes, submitted in batches. By system call, as
 * <linux/io_uring.h> says; no library.
 */
#ifndef KVL_URING_H
#define KVL_URING_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

struct io_uring_sqe;
struct io_uring_cqe;

/* One thread at a time. */
struct kvl_uring {
	int fd; /* its own; readable while something waits to be reaped */
	void *rings;
	uint64_t rings_size;
	struct io_uring_sqe *sqes;
	uint64_t sqes_size;
	uint32_t *sq_tail, *cq_head, *cq_tail; /* shared with the kernel */
	uint32_t sq_mask, cq_mask;
	struct io_uring_cqe *cqes;
	uint32_t prepared; /* and not yet submitted */
};

/* Make a ring with room for (entries), a power of two. 0 or an errno: ENOSYS, EPERM where the host has none for us. */
int kvl_uring_init(struct kvl_uring *ring, uint32_t entries);
void kvl_uring_deinit(struct kvl_uring *ring);

/* Prepare an operation; no more of them may be under way than the ring has entries. (flags): RWF_*. */
void kvl_uring_prepare_read(struct kvl_uring *ring, int fd, struct iovec *iov, uint32_t count, uint64_t offset,
			    uint64_t id);
void kvl_uring_prepare_write(struct kvl_uring *ring, int fd, struct iovec *iov, uint32_t count, uint64_t offset,
			     int flags, uint64_t id);
void kvl_uring_prepare_flush(struct kvl_uring *ring, int fd, uint64_t id);

/* Hand over what was prepared. 0 or an errno. */
int kvl_uring_submit(struct kvl_uring *ring);

/* Whether there is something to reap. */
bool kvl_uring_is_ready(const struct kvl_uring *ring);

/* Take a finished operation: its (id), and in (result) bytes or a negative errno. False if there is none. */
bool kvl_uring_reap(struct kvl_uring *ring, uint64_t *id, int32_t *result);

/* Wait until there is something to reap. 0 or an errno. */
int kvl_uring_wait(struct kvl_uring *ring);

#endif
