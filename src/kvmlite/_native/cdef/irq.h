#define KVL_IRQ_QUEUE ...
#define KVL_IRQ_CONFIG ...
#define KVL_ACKS_RING_SIZE ...

struct kvl_irq {
	int eventfd;
	...;
};

struct kvl_acks {
	...;
};

void kvl_irq_init(struct kvl_irq *irq, int eventfd);
void kvl_irq_deinit(struct kvl_irq *irq);
void kvl_irq_show(struct kvl_irq *irq, uint32_t *status);
void kvl_irq_set_line(struct kvl_irq *irq, int vm_fd, uint32_t gsi);
void kvl_irq_drop_line(struct kvl_irq *irq);
void kvl_irq_set_always(struct kvl_irq *irq, uint32_t bits);
int kvl_irq_raise(struct kvl_irq *irq, uint32_t bits);
uint32_t kvl_irq_status(const struct kvl_irq *irq);
void kvl_irq_ack(struct kvl_irq *irq, uint32_t bits);
void kvl_acks_init(struct kvl_acks *acks);
void kvl_acks_deinit(struct kvl_acks *acks);
bool kvl_acks_add(struct kvl_acks *acks, struct kvl_irq *irq, uint64_t ack_gpa);
void kvl_acks_set_ring(struct kvl_acks *acks, void *ring);
