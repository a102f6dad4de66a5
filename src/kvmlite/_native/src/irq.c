#include "irq.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

void kvl_irq_init(struct kvl_irq *irq, int eventfd)
{
	memset(irq, 0, sizeof(*irq));
	irq->eventfd = eventfd;
	irq->status = &irq->own_status;
	pthread_mutex_init(&irq->lock, NULL);
}

void kvl_irq_deinit(struct kvl_irq *irq)
{
	pthread_mutex_destroy(&irq->lock);
}

void kvl_irq_show(struct kvl_irq *irq, uint32_t *status)
{
	irq->own_status = 0;
	irq->status = status ? status : &irq->own_status;
}

void kvl_irq_set_line(struct kvl_irq *irq, int vm_fd, uint32_t gsi)
{
	pthread_mutex_lock(&irq->lock);
	irq->vm_fd = vm_fd;
	irq->gsi = gsi;
	irq->has_line = true;
	pthread_mutex_unlock(&irq->lock);
}

void kvl_irq_drop_line(struct kvl_irq *irq)
{
	pthread_mutex_lock(&irq->lock);
	irq->has_line = false;
	pthread_mutex_unlock(&irq->lock);
}

static void clear(struct kvl_irq *irq, uint32_t bits)
{
	__atomic_fetch_and(irq->status, ~bits | __atomic_load_n(&irq->always, __ATOMIC_RELAXED), __ATOMIC_ACQ_REL);
}

/*
 * Carry out what KVM has noted so far. A driver acknowledges before it looks into its queues, so an acknowledgement
 * that is late by this much hides nothing from it. One that is noted must not outlive the next interrupt, though: it
 * would clear a bit that its driver has not seen.
 */
static void take(struct kvl_acks *acks)
{
	const uint32_t size = (KVL_ACKS_RING_SIZE - sizeof(*acks->ring)) / sizeof(acks->ring->coalesced_mmio[0]);
	struct kvm_coalesced_mmio_ring *ring = acks ? __atomic_load_n(&acks->ring, __ATOMIC_ACQUIRE) : NULL;

	if (!ring || __atomic_load_n(&ring->first, __ATOMIC_RELAXED) == __atomic_load_n(&ring->last, __ATOMIC_RELAXED))
		return;
	pthread_mutex_lock(&acks->lock);
	for (uint32_t first = ring->first; first != __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE);) {
		const struct kvm_coalesced_mmio *entry = &ring->coalesced_mmio[first];
		uint32_t bits;

		memcpy(&bits, entry->data, sizeof(bits));
		for (uint32_t i = 0; i < acks->count; i++)
			if (acks->irqs[i]->ack_gpa == entry->phys_addr && entry->len == sizeof(bits))
				clear(acks->irqs[i], bits);
		first = (first + 1) % size;
		__atomic_store_n(&ring->first, first, __ATOMIC_RELEASE);
	}
	pthread_mutex_unlock(&acks->lock);
}

void kvl_irq_set_always(struct kvl_irq *irq, uint32_t bits)
{
	__atomic_store_n(&irq->always, bits, __ATOMIC_RELAXED);
	__atomic_fetch_or(irq->status, bits, __ATOMIC_RELEASE);
}

static int signal_eventfd(const struct kvl_irq *irq)
{
	const uint64_t one = 1;

	while (write(irq->eventfd, &one, sizeof(one)) < 0) {
		if (errno == EAGAIN)
			return 0; /* the counter is full: a signal is pending anyway */
		if (errno != EINTR)
			return errno;
	}
	return 0;
}

static int set_level(const struct kvl_irq *irq, uint32_t level)
{
	struct kvm_irq_level line = {.irq = irq->gsi, .level = level};

	return ioctl(irq->vm_fd, KVM_IRQ_LINE, &line) < 0 ? errno : 0;
}

int kvl_irq_raise(struct kvl_irq *irq, uint32_t bits)
{
	int error;

	take(irq->acks);
	/* Release: who reads the bit sees what it announces. Before the signal, or the driver would find no bit. */
	__atomic_fetch_or(irq->status, bits, __ATOMIC_RELEASE);
	pthread_mutex_lock(&irq->lock);
	if (irq->has_line) {
		error = set_level(irq, 1);
		if (!error)
			error = set_level(irq, 0);
	} else {
		error = signal_eventfd(irq);
	}
	pthread_mutex_unlock(&irq->lock);
	return error;
}

uint32_t kvl_irq_status(const struct kvl_irq *irq)
{
	take(irq->acks);
	/* Pairs with the release in kvl_irq_raise. */
	return __atomic_load_n(irq->status, __ATOMIC_ACQUIRE);
}

void kvl_irq_ack(struct kvl_irq *irq, uint32_t bits)
{
	take(irq->acks); /* makes room: the ring is full, or this would be no exit */
	clear(irq, bits);
}

void kvl_acks_init(struct kvl_acks *acks)
{
	memset(acks, 0, sizeof(*acks));
	pthread_mutex_init(&acks->lock, NULL);
}

void kvl_acks_deinit(struct kvl_acks *acks)
{
	for (uint32_t i = 0; i < acks->count; i++)
		acks->irqs[i]->acks = NULL;
	pthread_mutex_destroy(&acks->lock);
}

bool kvl_acks_add(struct kvl_acks *acks, struct kvl_irq *irq, uint64_t ack_gpa)
{
	if (acks->count == KVL_ACKS_MAX_DEVICES)
		return false;
	irq->acks = acks;
	irq->ack_gpa = ack_gpa;
	acks->irqs[acks->count++] = irq;
	return true;
}

void kvl_acks_set_ring(struct kvl_acks *acks, void *ring)
{
	__atomic_store_n(&acks->ring, (struct kvm_coalesced_mmio_ring *)ring, __ATOMIC_RELEASE);
}
