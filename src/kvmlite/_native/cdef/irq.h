#define KVL_IRQ_QUEUE ...
#define KVL_IRQ_CONFIG ...

struct kvl_irq {
	int eventfd;
	...;
};

void kvl_irq_init(struct kvl_irq *irq, int eventfd);
void kvl_irq_set_always(struct kvl_irq *irq, uint32_t bits);
int kvl_irq_raise(struct kvl_irq *irq, uint32_t bits);
uint32_t kvl_irq_status(const struct kvl_irq *irq);
void kvl_irq_ack(struct kvl_irq *irq, uint32_t bits);
