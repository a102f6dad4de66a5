#include "irq.h"

#include <errno.h>
#include <unistd.h>

void kvl_irq_init(struct kvl_irq *irq, int eventfd)
{
	irq->eventfd = eventfd;
	__atomic_store_n(&irq->always, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&irq->status, 0, __ATOMIC_RELEASE);
}

void kvl_irq_set_always(struct kvl_irq *irq, uint32_t bits)
{
	__atomic_store_n(&irq->always, bits, __ATOMIC_RELEASE);
}

int kvl_irq_raise(struct kvl_irq *irq, uint32_t bits)
{
	const uint64_t one = 1;

	/* Release: who reads the bit sees what it announces. Before the signal, or the driver would find no bit. */
	__atomic_fetch_or(&irq->status, bits, __ATOMIC_RELEASE);
	while (write(irq->eventfd, &one, sizeof(one)) < 0) {
		if (errno == EAGAIN)
			return 0; /* the counter is full: a signal is pending anyway */
		if (errno != EINTR)
			return errno;
	}
	return 0;
}

uint32_t kvl_irq_status(const struct kvl_irq *irq)
{
	/* Pairs with the release in kvl_irq_raise. */
	return __atomic_load_n(&irq->status, __ATOMIC_ACQUIRE) | __atomic_load_n(&irq->always, __ATOMIC_RELAXED);
}

void kvl_irq_ack(struct kvl_irq *irq, uint32_t bits)
{
	__atomic_fetch_and(&irq->status, ~bits, __ATOMIC_ACQ_REL);
}
