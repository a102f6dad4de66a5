/*
 * Interrupt of a virtio-mmio device: a status register shared by the vCPU threads, which read and acknowledge it, and
 * whoever raises it, Python device or C worker.
 *
 * The register may lie in a page that the guest reads by itself, and acknowledgements may wait in a ring that KVM fills:
 * then no interrupt makes the guest leave for this process.
 */
#ifndef KVL_IRQ_H
#define KVL_IRQ_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

/* Bits of InterruptStatus (VIRTIO 1.2, 4.2.2). */
enum {
	KVL_IRQ_QUEUE = 1 << 0,  /* the device used a buffer */
	KVL_IRQ_CONFIG = 1 << 1, /* the configuration changed, or the device needs a reset */
};

enum {
	KVL_ACKS_MAX_DEVICES = 32,
	KVL_ACKS_RING_SIZE = 4096, /* bytes of a KVM ring: a page */
};

struct kvl_irq {
	uint32_t *status;     /* atomic; KVL_IRQ_* not yet acknowledged; the driver may read it at any time */
	uint32_t always;      /* atomic; KVL_IRQ_* that no acknowledgement clears */
	int eventfd;          /* an irqfd, the caller's */
	pthread_mutex_t lock; /* guards the line: two that pulse it at once would make one edge */
	bool has_line;        /* pulse (gsi) of (vm_fd) rather than signal */
	int vm_fd;
	uint32_t gsi;
	struct kvl_acks *acks; /* NULL: an acknowledgement is an exit */
	uint64_t ack_gpa;
	uint32_t own_status; /* where (status) points if nobody else reads it */
};

/* Acknowledgements that KVM noted for the devices of a VM (KVM API, KVM_REGISTER_COALESCED_MMIO). */
struct kvl_acks {
	pthread_mutex_t lock;                 /* who takes entries out */
	struct kvm_coalesced_mmio_ring *ring; /* atomic; NULL until a vCPU exists */
	uint32_t count;
	struct kvl_irq *irqs[KVL_ACKS_MAX_DEVICES];
};

/* It signals (eventfd), and its status is nobody else's to read, until told otherwise below. */
void kvl_irq_init(struct kvl_irq *irq, int eventfd);
void kvl_irq_deinit(struct kvl_irq *irq);

/* Keep the status in a word that the guest can read; NULL: in its own again, cleared. While the driver is not up. */
void kvl_irq_show(struct kvl_irq *irq, uint32_t *status);

/*
 * Pulse line (gsi) of the VM (vm_fd) instead of signalling. An irqfd of a line is served by a kernel thread; this is
 * done when it returns. Nobody else may pulse that line, an irqfd neither.
 */
void kvl_irq_set_line(struct kvl_irq *irq, int vm_fd, uint32_t gsi);

/* Signal the eventfd again: it has become an irqfd. No pulse is under way when this returns. */
void kvl_irq_drop_line(struct kvl_irq *irq);

/*
 * Have (bits) read as set whatever is acknowledged. With KVL_IRQ_QUEUE, whoever serves the queues (vhost, a vhost-user
 * daemon) may signal the eventfd by itself: the driver then looks into its queues and finds what there is, or nothing.
 */
void kvl_irq_set_always(struct kvl_irq *irq, uint32_t bits);

/* Set (bits), then interrupt. Returns 0, or the errno of write(2) or KVM_IRQ_LINE. Any thread; does not block. */
int kvl_irq_raise(struct kvl_irq *irq, uint32_t bits);

/* Bits that wait for the driver. Any thread. */
uint32_t kvl_irq_status(const struct kvl_irq *irq);

/* Clear (bits): the driver has seen them. Any thread. */
void kvl_irq_ack(struct kvl_irq *irq, uint32_t bits);

void kvl_acks_init(struct kvl_acks *acks);
void kvl_acks_deinit(struct kvl_acks *acks);

/*
 * From now on KVM notes the acknowledgements of (irq), written to GPA (ack_gpa). False if there is no room. Before a
 * vCPU runs; (irq) must outlive the last vCPU and the last raise of any of these.
 */
bool kvl_acks_add(struct kvl_acks *acks, struct kvl_irq *irq, uint64_t ack_gpa);

/* Where KVM notes them: a page shared with it. Before a vCPU runs; or NULL, when none runs any more. */
void kvl_acks_set_ring(struct kvl_acks *acks, void *ring);

#endif
