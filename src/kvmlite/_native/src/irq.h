/*
 * Interrupt of a virtio-mmio device: a status register shared by the vCPU threads, which read and acknowledge it, and
 * whoever raises it, Python device or C worker.
 */
#ifndef KVL_IRQ_H
#define KVL_IRQ_H

#include <stdint.h>

/* Bits of InterruptStatus (VIRTIO 1.2, 4.2.2). */
enum {
	KVL_IRQ_QUEUE = 1 << 0,  /* the device used a buffer */
	KVL_IRQ_CONFIG = 1 << 1, /* the configuration changed, or the device needs a reset */
};

struct kvl_irq {
	int eventfd;     /* an irqfd, the caller's */
	uint32_t status; /* atomic; KVL_IRQ_* not yet acknowledged */
	uint32_t always; /* atomic; KVL_IRQ_* that no acknowledgement clears */
};

void kvl_irq_init(struct kvl_irq *irq, int eventfd);

/*
 * Have (bits) read as set whatever is acknowledged. With KVL_IRQ_QUEUE, whoever serves the queues (vhost, a vhost-user
 * daemon) may signal the eventfd by itself: the driver then looks into its queues and finds what there is, or nothing.
 */
void kvl_irq_set_always(struct kvl_irq *irq, uint32_t bits);

/* Set (bits), then signal. Returns 0 or the errno of write(2). Any thread; does not block. */
int kvl_irq_raise(struct kvl_irq *irq, uint32_t bits);

/* Bits that wait for the driver. Any thread. */
uint32_t kvl_irq_status(const struct kvl_irq *irq);

/* Clear (bits): the driver has seen them. Any thread. */
void kvl_irq_ack(struct kvl_irq *irq, uint32_t bits);

#endif
