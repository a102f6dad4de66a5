/*
 * The vCPU loop: KVM_RUN until an exit that C does not own.
 *
 * C owns serial ports, the interrupt registers of virtio-mmio devices (if the guest leaves for them at all, ADR 9) and
 * everything nobody claims; all else in a claimed range returns to Python.
 */
#ifndef KVL_VCPU_H
#define KVL_VCPU_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "irq.h"
#include "serial.h"

enum {
	KVL_BUS_MAX_RANGES = 64,
	KVL_STATS_SLOTS = 256, /* power of two */
	KVL_STATS_REASONS = 48,
	KVL_STATS_MMIO = 1 << 30, /* added to a key's kind: MMIO rather than port */
};

/* Registers of a virtio-mmio device that are read and written on each of its interrupts (VIRTIO 1.2, 4.2.2). */
enum {
	KVL_MMIO_INTERRUPT_STATUS = 0x60,
	KVL_MMIO_INTERRUPT_ACK = 0x64,
};

/* One claimed range. What neither the serial port nor the interrupt behind it takes goes to Python. */
struct kvl_range {
	uint64_t base;
	uint64_t size;
	struct kvl_serial *serial;
	struct kvl_irq *irq;
};

/* Written by Python before a vCPU runs, then only read. */
struct kvl_bus {
	uint32_t port_count, mmio_count;
	struct kvl_range ports[KVL_BUS_MAX_RANGES];
	struct kvl_range mmio[KVL_BUS_MAX_RANGES];
};

/* Exits at one address. */
struct kvl_address_count {
	uint64_t address;
	uint64_t reads, writes;
	uint32_t is_mmio, used;
};

/* Written by the vCPU thread alone; others may read at any time (each count is exact once the vCPU has stopped). */
struct kvl_vcpu_stats {
	uint64_t exits;        /* returns of KVM_RUN */
	uint64_t python_exits; /* of these, handed up */
	uint64_t first_run_ns; /* CLOCK_MONOTONIC of the first KVM_RUN; 0 before */
	uint64_t other_addresses;
	uint64_t reasons[KVL_STATS_REASONS];
	struct kvl_address_count addresses[KVL_STATS_SLOTS];
};

/* An exit handed to Python. */
struct kvl_exit {
	uint32_t reason;   /* KVM_EXIT_*; KVM_EXIT_INTR after a kick; KVM_EXIT_UNKNOWN with error set if KVM_RUN failed */
	int error;         /* errno of KVM_RUN, or 0 */
	uint64_t address;  /* port or GPA; system event type; hardware error code */
	uint32_t size;     /* bytes per access */
	uint32_t count;    /* accesses (string I/O) */
	uint32_t is_write;
	uint8_t *data;     /* size * count bytes inside kvm_run: what was written, or where the answer goes */
};

struct kvl_vcpu {
	int fd;
	struct kvm_run *run;
	const struct kvl_bus *bus;
	pthread_mutex_t lock; /* guards thread, inside, immediate_exit */
	pthread_t thread;
	bool inside;
	struct kvl_vcpu_stats stats;
};

/* (fd), (run) and (bus) stay the caller's and must outlive the vCPU. */
int kvl_vcpu_init(struct kvl_vcpu *vcpu, int fd, struct kvm_run *run, const struct kvl_bus *bus);
void kvl_vcpu_deinit(struct kvl_vcpu *vcpu);

/* Run the guest until Python has to act. Always the same thread: KVM wants one thread per vCPU. */
void kvl_vcpu_run(struct kvl_vcpu *vcpu, struct kvl_exit *ret);

/* Make kvl_vcpu_run() return with KVM_EXIT_INTR soon, now or at its next call. Any thread. */
void kvl_vcpu_kick(struct kvl_vcpu *vcpu);

/*
 * Install the no-op handler for the kick signal, once per process. 0, or an errno: EBUSY if somebody else
 * handles that signal already.
 */
int kvl_kick_signal_init(void);

/* The signal used: SIGRTMIN + 5. */
int kvl_kick_signal(void);

/* Name the calling thread (at most 15 bytes are kept), for ps and gdb. */
void kvl_thread_set_name(const char *name);

#endif
