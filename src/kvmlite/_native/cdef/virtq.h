enum kvl_error {
	KVL_OK,
	KVL_E_QUEUE_SIZE,
	KVL_E_RING_ALIGN,
	KVL_E_RING_RANGE,
	KVL_E_AVAIL_JUMP,
	KVL_E_OVERCOMMIT,
	KVL_E_HEAD,
	KVL_E_DESC_INDEX,
	KVL_E_CHAIN_TOO_LONG,
	KVL_E_CHAIN_TOO_LARGE,
	KVL_E_DESC_ORDER,
	KVL_E_DESC_RANGE,
	KVL_E_INDIRECT_OFF,
	KVL_E_INDIRECT_NEXT,
	KVL_E_INDIRECT_NESTED,
	KVL_E_INDIRECT_SIZE,
	KVL_E_INDIRECT_RANGE,
	KVL_E_REQUEST_HEADER,
	KVL_E_REQUEST_STATUS,
	KVL_E_RX_BUFFER,
	...
};

#define KVL_VIRTQ_MAX_SIZE ...

struct iovec {
	void *iov_base;
	size_t iov_len;
	...;
};

struct kvl_virtq_layout {
	uint64_t desc_gpa;
	uint64_t avail_gpa;
	uint64_t used_gpa;
	uint32_t size;
	bool event_idx;
	bool indirect;
	...;
};

struct kvl_virtq {
	uint16_t size;
	uint16_t last_avail_idx;
	uint16_t used_idx;
	uint16_t signalled_used;
	uint32_t unsignalled;
	int fault;
	uint64_t fault_seen;
	uint64_t fault_limit;
	...;
};

struct kvl_chain {
	struct iovec *iov;
	uint16_t head;
	uint16_t readable_count;
	uint16_t writable_count;
	uint64_t readable_size;
	uint64_t writable_size;
	...;
};

const char *kvl_error_text(int code);
int kvl_virtq_init(struct kvl_virtq *q, const struct kvl_mem *mem, const struct kvl_virtq_layout *layout);
int kvl_virtq_pop(struct kvl_virtq *q, struct kvl_chain *ret);
int kvl_virtq_chain_at(struct kvl_virtq *q, uint16_t head, struct kvl_chain *ret);
bool kvl_virtq_has_chain(const struct kvl_virtq *q);
void kvl_virtq_push(struct kvl_virtq *q, uint16_t head, uint32_t written);
bool kvl_virtq_needs_interrupt(struct kvl_virtq *q);
void kvl_virtq_disable_notify(struct kvl_virtq *q);
bool kvl_virtq_enable_notify(struct kvl_virtq *q);
uint64_t kvl_iov_read(const struct iovec *iov, uint32_t count, uint64_t offset, void *to, uint64_t size);
uint64_t kvl_iov_write(const struct iovec *iov, uint32_t count, uint64_t offset, const void *from, uint64_t size);
