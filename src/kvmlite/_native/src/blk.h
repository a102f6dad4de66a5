/*
 * virtio-blk, device side (VIRTIO 1.2, 5.2): one queue of a disk, served by a worker.
 *
 * Requests are done one after the other, or with a ring (uring.h) up to the queue's size at a time. A request that the
 * disk cannot do is answered with an error; the queue lives.
 */
#ifndef KVL_BLK_H
#define KVL_BLK_H

#include "blk_request.h"
#include "irq.h"
#include "uring.h"
#include "worker.h"

enum {
	/* What a handler makes kvl_worker_run return: see (error). */
	KVL_BLK_HOST_ERROR = -100,
	KVL_BLK_IRQ_ERROR = -101,
	KVL_BLK_TIMER_ERROR = -102,
	KVL_BLK_RING_ERROR = -103,
};

/* A request under way in the ring. */
struct kvl_blk_slot {
	struct kvl_blk_request request;
	struct kvl_iovecs left; /* of its data, what has not been moved */
	uint64_t offset;        /* where that goes */
	uint32_t next_free;
};

/* Owned by the worker's thread while it runs. */
struct kvl_blk {
	const struct kvl_blk_config *config;
	struct kvl_virtq *queue;
	struct kvl_irq *irq;
	struct kvl_worker *worker;
	uint32_t source; /* the queue's number in the worker */
	int timer_fd;
	bool is_paused; /* others may read; until the timer expires, because of the limiter */
	struct iovec *iov;
	struct kvl_uring *ring;     /* or NULL */
	struct kvl_blk_slot *slots; /* as many as the queue has descriptors, with a ring */
	uint32_t first_free;
	uint32_t in_flight;         /* atomic, others may read */
	struct kvl_blk_stats stats; /* others may read at any time */
	int error;                  /* errno of the KVL_BLK_*_ERROR that was returned */
	uint64_t told[3];           /* errnos returned once; a bit each */
};

/*
 * (iov): room for the queue's size, with a ring for its square. (ring), (slots): NULL to do one request at a time. All
 * pointers are the caller's and outlive the worker.
 */
void kvl_blk_init(struct kvl_blk *blk, const struct kvl_blk_config *config, struct kvl_virtq *queue,
		  struct kvl_irq *irq, struct iovec *iov, struct kvl_uring *ring, struct kvl_blk_slot *slots);

/* Have (worker) serve the queue. (timer_fd): nonblocking; -1 without a limiter. 0, or -1 if the worker has no room. */
int kvl_blk_add_to_worker(struct kvl_blk *blk, struct kvl_worker *worker, int kick_fd, int timer_fd);

/*
 * Wait for the requests under way in the ring, and forget them: their chains are not given back. On the worker's thread,
 * after kvl_worker_run.
 */
void kvl_blk_abandon(struct kvl_blk *blk);

#endif
