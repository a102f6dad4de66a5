/*
 * 16550A serial port. In C because the guest's console is one exit per byte.
 *
 * The register file is touched by vCPU threads, the two byte queues also by the device loop: one mutex guards all.
 * Interrupts are edges of the line's level, written to an eventfd (an irqfd).
 */
#ifndef KVL_SERIAL_H
#define KVL_SERIAL_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum {
	KVL_SERIAL_OUT_SIZE = 65536, /* power of two, larger than any one string write (4096) */
	KVL_SERIAL_IN_SIZE = 4096,   /* power of two */
};

struct kvl_serial {
	pthread_mutex_t lock;
	int irq_eventfd;    /* raises the port's interrupt */
	int notify_eventfd; /* tells the host: output is waiting, or input has room again */
	bool line;          /* level of the interrupt line */
	bool thr_pending;   /* "transmitter empty" not yet seen by the driver */
	bool input_wanted;  /* the host has more input than fitted */
	uint8_t ier, fcr, lcr, mcr, scr, dll, dlm;
	uint32_t in_head, in_tail, out_head, out_tail; /* free running */
	uint64_t out_total, dropped;
	uint8_t in[KVL_SERIAL_IN_SIZE];
	uint8_t out[KVL_SERIAL_OUT_SIZE];
};

/* Both eventfds stay the caller's. */
int kvl_serial_init(struct kvl_serial *serial, int irq_eventfd, int notify_eventfd);
void kvl_serial_deinit(struct kvl_serial *serial);

/* One register access by the guest: offset 0-7. vCPU thread. */
uint8_t kvl_serial_read(struct kvl_serial *serial, unsigned offset);
void kvl_serial_write(struct kvl_serial *serial, unsigned offset, uint8_t value);

/* Room in the output queue, in bytes. A write without room loses the byte and counts it. */
uint32_t kvl_serial_room(struct kvl_serial *serial);

/* Take up to (size) bytes of output; returns how many. Device loop, or a vCPU thread that found no room. */
uint32_t kvl_serial_take_output(struct kvl_serial *serial, uint8_t *to, uint32_t size);

/* Offer input; returns how many bytes were taken. After a short count the notify eventfd fires when there is room. */
uint32_t kvl_serial_put_input(struct kvl_serial *serial, const uint8_t *from, uint32_t size);

#endif
