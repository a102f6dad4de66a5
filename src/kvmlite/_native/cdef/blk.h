#define KVL_BLK_SECTOR ...
#define KVL_BLK_ID_SIZE ...
#define KVL_BLK_MAX_SEGMENTS ...
#define KVL_BLK_MAX_DISCARD_SECTORS ...
#define KVL_BLK_MAX_ZERO_SECTORS ...
#define KVL_BLK_HOST_ERROR ...
#define KVL_BLK_IRQ_ERROR ...
#define KVL_BLK_TIMER_ERROR ...
#define KVL_BLK_RING_ERROR ...

#define KVL_COW_CLUSTER ...

struct kvl_cow {
	int base_fd;
	...;
};

struct kvl_bounce {
	uint64_t size;
	...;
};

struct kvl_disk {
	int fd;
	uint64_t size;
	bool is_device;
	bool is_private;
	uint64_t step_size;
	uint32_t is_stopping;
	struct kvl_cow *cow;
	uint32_t memory_align;
	struct kvl_bounce *bounce;
	...;
};

void kvl_cow_init(struct kvl_cow *cow, int base_fd, int top_fd, uint64_t size, uint64_t *written);
void kvl_bounce_init(struct kvl_bounce *bounce, uint8_t *buffer, uint64_t size);

struct kvl_blk_config {
	struct kvl_disk *disk;
	struct kvl_limiter *limiter;
	bool is_read_only;
	bool has_flush;
	uint32_t block_size;
	uint8_t id[...];
	...;
};

struct kvl_blk_stats {
	uint64_t reads, writes, flushes, others;
	uint64_t read_bytes, written_bytes;
	uint64_t refused;
	uint64_t failed;
	uint64_t interrupts;
	uint64_t pauses;
	...;
};

struct kvl_uring {
	int fd;
	...;
};

struct kvl_blk_slot {
	...;
};

struct kvl_blk {
	struct kvl_blk_stats stats;
	int error;
	bool is_paused;
	uint32_t in_flight;
	...;
};

void kvl_blk_init(struct kvl_blk *blk, const struct kvl_blk_config *config, struct kvl_virtq *queue,
		  struct kvl_irq *irq, struct iovec *iov, struct kvl_uring *ring, struct kvl_blk_slot *slots);
int kvl_blk_add_to_worker(struct kvl_blk *blk, struct kvl_worker *worker, int kick_fd, int timer_fd);
void kvl_blk_abandon(struct kvl_blk *blk);
int kvl_uring_init(struct kvl_uring *ring, uint32_t entries);
void kvl_uring_deinit(struct kvl_uring *ring);
