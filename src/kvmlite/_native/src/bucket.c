#include "bucket.h"

#include <string.h>

static const uint64_t LIMIT = UINT64_C(1) << 40;
static const uint64_t SECOND_NS = 1000000000;

void kvl_bucket_init(struct kvl_bucket *bucket, uint64_t rate, uint64_t burst, uint64_t now_ns)
{
	bucket->rate = rate < LIMIT ? rate : LIMIT;
	bucket->burst = burst < LIMIT ? burst : LIMIT;
	if (!bucket->burst)
		bucket->burst = 1;
	bucket->level = (int64_t)bucket->burst;
	bucket->filled_ns = now_ns;
}

/* Add what has come in since the last time. */
static void fill(struct kvl_bucket *bucket, uint64_t now_ns)
{
	uint64_t missing = (uint64_t)((int64_t)bucket->burst - bucket->level);
	unsigned __int128 units;

	/* Another thread may have read its clock later and come first. */
	if (now_ns <= bucket->filled_ns)
		return;
	units = (unsigned __int128)(now_ns - bucket->filled_ns) * bucket->rate / SECOND_NS;
	if (units >= missing) {
		bucket->level = (int64_t)bucket->burst;
		bucket->filled_ns = now_ns;
		return;
	}
	bucket->level += (int64_t)units;
	/* Only the time of whole units has been used: what is left of it counts the next time. */
	bucket->filled_ns += (uint64_t)((units * SECOND_NS + bucket->rate - 1) / bucket->rate);
}

uint64_t kvl_bucket_wait_ns(struct kvl_bucket *bucket, uint64_t now_ns)
{
	uint64_t owed;

	if (!bucket->rate)
		return 0;
	fill(bucket, now_ns);
	if (bucket->level > 0)
		return 0;
	owed = (uint64_t)(1 - bucket->level);
	return (uint64_t)((unsigned __int128)owed * SECOND_NS / bucket->rate) + 1;
}

void kvl_bucket_take(struct kvl_bucket *bucket, uint64_t amount)
{
	if (bucket->rate)
		bucket->level -= (int64_t)(amount < LIMIT ? amount : LIMIT);
}

void kvl_limiter_init(struct kvl_limiter *limiter)
{
	memset(limiter, 0, sizeof(*limiter));
	pthread_mutex_init(&limiter->lock, NULL);
}

uint64_t kvl_limiter_wait_ns(struct kvl_limiter *limiter, uint64_t now_ns)
{
	uint64_t bytes_ns, operations_ns;

	pthread_mutex_lock(&limiter->lock);
	bytes_ns = kvl_bucket_wait_ns(&limiter->bytes, now_ns);
	operations_ns = kvl_bucket_wait_ns(&limiter->operations, now_ns);
	pthread_mutex_unlock(&limiter->lock);
	return bytes_ns > operations_ns ? bytes_ns : operations_ns;
}

void kvl_limiter_take(struct kvl_limiter *limiter, uint64_t bytes)
{
	pthread_mutex_lock(&limiter->lock);
	kvl_bucket_take(&limiter->bytes, bytes);
	kvl_bucket_take(&limiter->operations, 1);
	pthread_mutex_unlock(&limiter->lock);
}
