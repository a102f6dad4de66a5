/*
 * Which chains of a queue are under way, kept by looking on while another process serves it: if that process dies, they
 * can be answered. Its interrupts pass through here, which is when its progress is taken down.
 */
#ifndef KVL_LEDGER_H
#define KVL_LEDGER_H

#include <stdbool.h>
#include <stdint.h>

#include "virtq.h"
#include "worker.h"

struct kvl_ledger {
	const struct kvl_virtq *queue; /* its rings; nothing else of it is used */
	uint8_t *open;                 /* for each head, 1 while under way; room for the queue's size; the caller's */
	int call_fd;                   /* what the process signals: an eventfd of the caller's, nonblocking */
	int irq_fd;                    /* what is signalled then, the caller's */
	uint16_t avail_idx;            /* taken down up to here */
	uint16_t used_idx;
	bool is_lost; /* more happened than the rings still show: wrong until the queue is seen empty */
};

/* A queue in which nothing is under way at (idx), both indices. */
void kvl_ledger_init(struct kvl_ledger *ledger, const struct kvl_virtq *queue, uint8_t *open, uint16_t idx, int call_fd,
		     int irq_fd);

/* Take down what has happened. Not while a worker does. */
void kvl_ledger_update(struct kvl_ledger *ledger);

/* Have a worker pass the interrupts on. Returns the source's number, or -1 if there is no room. */
int kvl_ledger_add_to_worker(struct kvl_ledger *ledger, struct kvl_worker *worker);

#endif
