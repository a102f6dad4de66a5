struct kvl_bucket {
	uint64_t rate;
	uint64_t burst;
	int64_t level;
	...;
};

struct kvl_limiter {
	struct kvl_bucket bytes, operations;
	...;
};

void kvl_bucket_init(struct kvl_bucket *bucket, uint64_t rate, uint64_t burst, uint64_t now_ns);
uint64_t kvl_bucket_wait_ns(struct kvl_bucket *bucket, uint64_t now_ns);
void kvl_bucket_take(struct kvl_bucket *bucket, uint64_t amount);
void kvl_limiter_init(struct kvl_limiter *limiter);
