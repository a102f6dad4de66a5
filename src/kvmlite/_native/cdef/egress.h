#define KVL_EGRESS_HEAD ...
#define KVL_EGRESS_MAX_RULES ...
#define KVL_EGRESS_MAX_REPLIES ...

struct kvl_egress_rule {
	uint8_t family;
	uint8_t prefix_size;
	uint8_t protocol;
	uint16_t port;
	uint8_t address[16];
};

struct kvl_egress {
	uint32_t rule_count;
	uint32_t reply_count;
	bool has_source;
	uint8_t source[4];
	struct kvl_egress_rule rules[...];
	uint16_t reply_ports[...];
};

struct virtio_net_hdr {
	uint8_t flags;
	uint8_t gso_type;
	uint16_t hdr_len;
	uint16_t gso_size;
	uint16_t csum_start;
	uint16_t csum_offset;
};

bool kvl_egress_allows(const struct kvl_egress *egress, const struct virtio_net_hdr *header, const uint8_t *frame, size_t size);
