#include "vcpu.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>

#include "timer.h"

void kvl_thread_set_name(const char *name)
{
	prctl(PR_SET_NAME, name);
}

int kvl_kick_signal(void)
{
	return SIGRTMIN + 5;
}

static void kicked(int signo)
{
	(void)signo; /* its arrival is the message: KVM_RUN returns EINTR */
}

int kvl_kick_signal_init(void)
{
	struct sigaction old, action = {.sa_handler = kicked};

	if (sigaction(kvl_kick_signal(), NULL, &old) < 0)
		return errno;
	if (old.sa_handler == kicked)
		return 0;
	if (old.sa_handler != SIG_DFL && old.sa_handler != SIG_IGN)
		return EBUSY;
	return sigaction(kvl_kick_signal(), &action, NULL) < 0 ? errno : 0;
}

int kvl_vcpu_init(struct kvl_vcpu *vcpu, int fd, struct kvm_run *run, const struct kvl_bus *bus)
{
	memset(vcpu, 0, sizeof(*vcpu));
	vcpu->fd = fd;
	vcpu->run = run;
	vcpu->bus = bus;
	return pthread_mutex_init(&vcpu->lock, NULL);
}

void kvl_vcpu_deinit(struct kvl_vcpu *vcpu)
{
	pthread_mutex_destroy(&vcpu->lock);
}

void kvl_vcpu_kick(struct kvl_vcpu *vcpu)
{
	pthread_mutex_lock(&vcpu->lock);
	/* Not inside: the flag waits for the next KVM_RUN. Inside: the signal ends the one under way. */
	__atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_RELEASE);
	if (vcpu->inside)
		pthread_kill(vcpu->thread, kvl_kick_signal());
	pthread_mutex_unlock(&vcpu->lock);
}

static void count_address(struct kvl_vcpu_stats *stats, uint64_t address, bool is_mmio, bool is_write)
{
	uint64_t slot = (address * 0x9e3779b97f4a7c15u) >> 56;

	for (unsigned probe = 0; probe < 16; probe++) {
		struct kvl_address_count *entry = &stats->addresses[(slot + probe) % KVL_STATS_SLOTS];

		if (!entry->used) {
			entry->used = 1;
			entry->address = address;
			entry->is_mmio = is_mmio;
		}
		if (entry->address == address && entry->is_mmio == is_mmio) {
			if (is_write)
				entry->writes++;
			else
				entry->reads++;
			return;
		}
	}
	stats->other_addresses++;
}

static const struct kvl_range *find_range(const struct kvl_range *ranges, uint32_t count, uint64_t address)
{
	for (uint32_t i = 0; i < count; i++)
		if (address >= ranges[i].base && address - ranges[i].base < ranges[i].size)
			return &ranges[i];
	return NULL;
}

/* A serial port takes byte accesses; wider ones see byte (offset) in their low byte, as on an 8-bit device. */
static bool serial_access(const struct kvl_range *range, struct kvl_exit *exit)
{
	struct kvl_serial *serial = range->serial;
	unsigned offset = (unsigned)(exit->address - range->base);

	/* No room for the whole write: Python empties the queue first, and may wait for the host there. */
	if (exit->is_write && offset == 0 && kvl_serial_room(serial) < exit->count)
		return false;
	for (uint32_t i = 0; i < exit->count; i++) {
		uint8_t *item = exit->data + (size_t)i * exit->size;

		if (exit->is_write) {
			kvl_serial_write(serial, offset, item[0]);
		} else {
			memset(item, 0, exit->size);
			item[0] = kvl_serial_read(serial, offset);
		}
	}
	return true;
}

/* What a driver does on each interrupt stays here; only the 4-byte accesses it has to use (VIRTIO 1.2, 4.2.2.2). */
static bool irq_access(const struct kvl_range *range, struct kvl_exit *exit)
{
	uint64_t offset = exit->address - range->base;
	uint32_t value;

	if (exit->size != sizeof(value))
		return false;
	if (offset == KVL_MMIO_INTERRUPT_STATUS && !exit->is_write) {
		value = kvl_irq_status(range->irq);
		memcpy(exit->data, &value, sizeof(value));
		return true;
	}
	if (offset == KVL_MMIO_INTERRUPT_ACK && exit->is_write) {
		memcpy(&value, exit->data, sizeof(value));
		kvl_irq_ack(range->irq, value);
		return true;
	}
	return false;
}

/* True if C has dealt with the access. */
static bool handle_access(struct kvl_vcpu *vcpu, struct kvl_exit *exit, bool is_mmio)
{
	const struct kvl_bus *bus = vcpu->bus;
	const struct kvl_range *range = is_mmio ? find_range(bus->mmio, bus->mmio_count, exit->address)
						: find_range(bus->ports, bus->port_count, exit->address);

	count_address(&vcpu->stats, exit->address, is_mmio, exit->is_write);
	if (!range) {
		/* A floating bus: reads give ones, writes go nowhere. */
		if (!exit->is_write)
			memset(exit->data, 0xff, (size_t)exit->size * exit->count);
		return true;
	}
	return (range->serial && serial_access(range, exit)) || (range->irq && irq_access(range, exit));
}

static bool handle_port(struct kvl_vcpu *vcpu, struct kvl_exit *exit)
{
	struct kvm_run *run = vcpu->run;

	exit->address = run->io.port;
	exit->size = run->io.size;
	exit->count = run->io.count;
	exit->is_write = run->io.direction == KVM_EXIT_IO_OUT;
	exit->data = (uint8_t *)run + run->io.data_offset;
	return handle_access(vcpu, exit, false);
}

static bool handle_mmio(struct kvl_vcpu *vcpu, struct kvl_exit *exit)
{
	struct kvm_run *run = vcpu->run;

	exit->address = run->mmio.phys_addr;
	exit->size = run->mmio.len;
	exit->count = 1;
	exit->is_write = run->mmio.is_write;
	exit->data = run->mmio.data;
	return handle_access(vcpu, exit, true);
}

/* True if the exit is Python's. */
static bool dispatch(struct kvl_vcpu *vcpu, struct kvl_exit *exit)
{
	struct kvm_run *run = vcpu->run;
	uint32_t reason = run->exit_reason;

	vcpu->stats.reasons[reason < KVL_STATS_REASONS ? reason : 0]++;
	exit->reason = reason;
	switch (reason) {
	case KVM_EXIT_IO:
		return !handle_port(vcpu, exit);
	case KVM_EXIT_MMIO:
		return !handle_mmio(vcpu, exit);
	case KVM_EXIT_SYSTEM_EVENT:
		exit->address = run->system_event.type;
		return true;
	case KVM_EXIT_FAIL_ENTRY:
		exit->address = run->fail_entry.hardware_entry_failure_reason;
		return true;
	case KVM_EXIT_INTERNAL_ERROR:
		exit->address = run->internal.suberror;
		return true;
	default:
		exit->address = run->hw.hardware_exit_reason;
		return true;
	}
}

static void enter(struct kvl_vcpu *vcpu)
{
	pthread_mutex_lock(&vcpu->lock);
	vcpu->thread = pthread_self();
	vcpu->inside = true;
	pthread_mutex_unlock(&vcpu->lock);
}

static void leave(struct kvl_vcpu *vcpu, bool interrupted)
{
	pthread_mutex_lock(&vcpu->lock);
	vcpu->inside = false;
	if (interrupted)
		__atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_RELEASE);
	pthread_mutex_unlock(&vcpu->lock);
}

void kvl_vcpu_run(struct kvl_vcpu *vcpu, struct kvl_exit *ret)
{
	struct kvl_vcpu_stats *stats = &vcpu->stats;
	bool interrupted = false;

	memset(ret, 0, sizeof(*ret));
	enter(vcpu);
	if (!stats->first_run_ns)
		stats->first_run_ns = kvl_monotonic_ns();
	for (;;) {
		int failed = ioctl(vcpu->fd, KVM_RUN, 0);

		stats->exits++;
		if (failed < 0) {
			interrupted = errno == EINTR || errno == EAGAIN;
			ret->reason = interrupted ? KVM_EXIT_INTR : KVM_EXIT_UNKNOWN;
			ret->error = interrupted ? 0 : errno;
			stats->reasons[ret->reason]++;
			break;
		}
		if (dispatch(vcpu, ret))
			break;
	}
	stats->python_exits++;
	leave(vcpu, interrupted);
}
