#define KVL_NET_HEADER ...
#define KVL_NET_PACKET_MAX ...
#define KVL_NET_QUEUE_MAX ...
#define KVL_NET_E_RX_QUEUE ...
#define KVL_NET_E_GONE ...
#define KVL_NET_E_PEER ...

struct kvl_net_counters {
	uint64_t rx_packets;
	uint64_t rx_bytes;
	uint64_t rx_dropped;
	uint64_t tx_packets;
	uint64_t tx_bytes;
	uint64_t tx_dropped;
	uint64_t tx_refused;
	...;
};

struct kvl_net {
	struct kvl_virtq *rx;
	struct kvl_virtq *tx;
	struct kvl_irq *irq;
	struct kvl_worker *worker;
	const struct kvl_egress *egress;
	struct kvl_limiter *rx_limiter;
	struct kvl_limiter *tx_limiter;
	int rx_timer;
	int tx_timer;
	uint64_t pauses;
	int fd;
	bool is_stream;
	bool is_mergeable;
	bool has_flags;
	uint32_t rx_room;
	int error;
	struct kvl_net_counters counters;
	...;
};

int kvl_net_start(struct kvl_net *net, int rx_kick, int tx_kick);
void kvl_net_set_link(struct kvl_net *net, bool is_up);
