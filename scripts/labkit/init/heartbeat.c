/*
 * Interrupt each CPU a few times a second, from outside: without it the lab freezes now and then.
 *
 * QEMU keeps a CPU's pending interrupts in one word, CPUState.interrupt_request. helper_vmrun() and
 * do_vmexit() (target/i386/tcg/sysemu/svm_helper.c) change a bit of it without the lock and not
 * atomically, and may so undo what a timer, a device or another CPU has just set there. The vector
 * stays in the APIC's IRR, but nothing looks at that until the next interrupt comes to this APIC.
 * A timer that Linux arms for one shot at a time sends no next one, and a CPU that waits for the
 * answer to a lost IPI does so with preemption off: so help has to come from a device, to each CPU
 * by itself.
 *
 * A heartbeat is a port with a virtio device, and so an interrupt, of its own. The host writes a
 * byte to it; its reader runs on that CPU before all else, so that the next byte interrupts again.
 * A heartbeat's own interrupt can be lost too, and as it is level-triggered there is no next one
 * either: then it is the reader's timer that comes to its help. Only if both are lost at a time
 * does the CPU stay frozen.
 */
#define _GNU_SOURCE
#include "lab.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { LATE_MS = 500 }; /* more than the time from one beat to the next */

static void *read_beats(void *argument)
{
	int port = (int)(intptr_t)argument;
	char beats[64];

	for (;;) {
		poll(&(struct pollfd){ .fd = port, .events = POLLIN }, 1, LATE_MS);
		if (read(port, beats, sizeof(beats)) == 0)
			usleep(LATE_MS * 1000); /* the host's end is not announced yet, or closed */
	}
	return NULL;
}

/* "vport3p1" is a port of virtio3, which is also what its interrupt is called. */
static void send_interrupt_to(long cpu, const char *port)
{
	char device[32], irq[256], path[300], number[16];
	unsigned int index;

	if (sscanf(port, "/dev/vport%u", &index) != 1) {
		errno = EINVAL;
		die("name of", port);
	}
	snprintf(device, sizeof(device), "virtio%u", index);
	find_entry(irq, sizeof(irq), "/sys/kernel/irq", "/sys/kernel/irq/%s/actions", device);
	snprintf(path, sizeof(path), "/proc/irq/%s/smp_affinity_list", irq);
	int file = open(path, O_WRONLY | O_CLOEXEC);
	int size = snprintf(number, sizeof(number), "%ld", cpu);
	if (file < 0 || write(file, number, (size_t)size) != size)
		die("write", path);
	close(file);
}

static void start_reader(long cpu, int port)
{
	struct sched_param first = { .sched_priority = 1 };
	pthread_attr_t attributes;
	pthread_t thread;
	sigset_t all;
	cpu_set_t set;

	CPU_ZERO(&set);
	CPU_SET((size_t)cpu, &set);
	pthread_attr_init(&attributes);
	pthread_attr_setaffinity_np(&attributes, sizeof(set), &set);
	pthread_attr_setinheritsched(&attributes, PTHREAD_EXPLICIT_SCHED);
	pthread_attr_setschedpolicy(&attributes, SCHED_FIFO);
	pthread_attr_setschedparam(&attributes, &first);
	sigfillset(&all);
	pthread_attr_setsigmask_np(&attributes, &all); /* they are for the main thread's signalfd */
	errno = pthread_create(&thread, &attributes, read_beats, (void *)(intptr_t)port);
	if (errno)
		die("start", "heartbeat");
	pthread_attr_destroy(&attributes);
}

void start_heartbeats(void)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);

	for (long cpu = 0; cpu < cpus; cpu++) {
		char name[32], path[300];

		snprintf(name, sizeof(name), "heartbeat%ld", cpu);
		find_port(path, sizeof(path), name);
		int port = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
		if (port < 0)
			die("open", path);
		send_interrupt_to(cpu, path);
		start_reader(cpu, port);
	}
}
