#define KVL_BUS_MAX_RANGES ...
#define KVL_STATS_SLOTS ...
#define KVL_STATS_REASONS ...

struct kvl_range {
	uint64_t base;
	uint64_t size;
	struct kvl_serial *serial;
	struct kvl_irq *irq;
	...;
};

struct kvl_bus {
	uint32_t port_count, mmio_count;
	struct kvl_range ports[...];
	struct kvl_range mmio[...];
	...;
};

struct kvl_address_count {
	uint64_t address;
	uint64_t reads, writes;
	uint32_t is_mmio, used;
	...;
};

struct kvl_vcpu_stats {
	uint64_t exits;
	uint64_t python_exits;
	uint64_t first_run_ns;
	uint64_t other_addresses;
	uint64_t reasons[...];
	struct kvl_address_count addresses[...];
	...;
};

struct kvl_exit {
	uint32_t reason;
	int error;
	uint64_t address;
	uint32_t size;
	uint32_t count;
	uint32_t is_write;
	uint8_t *data;
	...;
};

struct kvl_vcpu {
	struct kvl_vcpu_stats stats;
	...;
};

int kvl_vcpu_init(struct kvl_vcpu *vcpu, int fd, struct kvm_run *run, const struct kvl_bus *bus);
void kvl_vcpu_deinit(struct kvl_vcpu *vcpu);
void kvl_vcpu_run(struct kvl_vcpu *vcpu, struct kvl_exit *ret);
void kvl_vcpu_kick(struct kvl_vcpu *vcpu);
int kvl_kick_signal_init(void);
int kvl_kick_signal(void);
void kvl_thread_set_name(const char *name);
