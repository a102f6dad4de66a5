/*
 * Token buckets: so many units a second on average, and a burst at once. What is taken may be more than there is: the
 * rest is owed and waited for afterwards, so that no request is too large to be served.
 */
#ifndef KVL_BUCKET_H
#define KVL_BUCKET_H

#include <pthread.h>
#include <stdint.h>

/* Owned by one thread at a time. Times are CLOCK_MONOTONIC. */
struct kvl_bucket {
	uint64_t rate;  /* units a second, at most 2^40; 0: unlimited */
	uint64_t burst; /* units that gather while nothing is taken, at most 2^40 */
	int64_t level;  /* units there are; negative: owed */
	uint64_t filled_ns;
};

/* Full. (rate) and (burst) are cut to their limits; a burst is at least one unit. */
void kvl_bucket_init(struct kvl_bucket *bucket, uint64_t rate, uint64_t burst, uint64_t now_ns);

/* Nanoseconds until something may be taken; 0 if it may be now. */
uint64_t kvl_bucket_wait_ns(struct kvl_bucket *bucket, uint64_t now_ns);

/* Take (amount), after kvl_bucket_wait_ns said 0. */
void kvl_bucket_take(struct kvl_bucket *bucket, uint64_t amount);

/* What a device may do: bytes and operations. Shared by the workers of its queues. */
struct kvl_limiter {
	pthread_mutex_t lock;
	struct kvl_bucket bytes, operations;
};

/* Its buckets are the caller's to initialise. */
void kvl_limiter_init(struct kvl_limiter *limiter);

/* Nanoseconds until the next operation may begin; 0 if it may now. (now_ns): kvl_monotonic_ns(). */
uint64_t kvl_limiter_wait_ns(struct kvl_limiter *limiter, uint64_t now_ns);

/* Count an operation that begins. */
void kvl_limiter_take(struct kvl_limiter *limiter, uint64_t bytes);

#endif
