/*
 * What guests without a kernel share: entry into ring 3, virtio-mmio registers, split rings, the first serial port.
 * Interrupts stay off; a guest polls the used rings as fast as it can.
 */
#ifndef RING3_H
#define RING3_H

#include <stdint.h>

enum { SERIAL = 0x3f8, F_NEXT = 1, F_WRITE = 2 };

enum { MAGIC = 0x000, DEVICE_ID = 0x008, DRIVER_FEATURES = 0x020, DRIVER_FEATURES_SEL = 0x024, QUEUE_SEL = 0x030,
       QUEUE_NUM = 0x038, QUEUE_READY = 0x044, QUEUE_NOTIFY = 0x050, STATUS = 0x070, QUEUE_DESC = 0x080,
       QUEUE_DRIVER = 0x090, QUEUE_DEVICE = 0x0a0 };

struct desc {
	uint64_t addr;
	uint32_t len;
	uint16_t flags, next;
};

struct used {
	uint32_t id, len;
};

static uintptr_t device;

/* Entered in 32-bit protected mode with flat segments; drops to ring 3 with all I/O ports allowed. */
__asm__(".section .note.Xen, \"a\", @note\n"
	".long 4, 4, 18\n"
	".asciz \"Xen\"\n"
	".long _start\n"
	".text\n"
	".globl _start\n"
	"_start:\n"
	"lgdt gdtr\n"
	"ljmp $8, $1f\n"
	"1: mov $16, %eax\n"
	"mov %ax, %ds\n mov %ax, %es\n mov %ax, %ss\n"
	"mov $0x1f0000, %esp\n"
	"mov %ebx, %esi\n"
	"push $0x3002\n popf\n" /* IOPL 3 */
	"mov $0x174, %ecx\n mov $8, %eax\n xor %edx, %edx\n wrmsr\n" /* SYSENTER_CS */
	"mov $0x23, %eax\n"
	"mov %ax, %ds\n mov %ax, %es\n mov %ax, %fs\n mov %ax, %gs\n"
	"mov $2f, %edx\n mov $0x1e0000, %ecx\n"
	"sysexit\n" /* KVM's instruction emulator has no return to ring 3 but this */
	"2: push %esi\n"
	"call guest_main\n"
	"3: pause\n jmp 3b\n"
	".data\n .balign 8\n"
	"gdt: .quad 0, 0x00cf9b000000ffff, 0x00cf93000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff\n"
	"gdtr: .word 39\n .long gdt\n"
	".text\n");

static uint64_t ticks(void)
{
	uint32_t low, high;

	__asm__ volatile("lfence; rdtsc" : "=a"(low), "=d"(high)::"memory");
	return (uint64_t)high << 32 | low;
}

static uint32_t load(uint32_t offset)
{
	return *(volatile uint32_t *)(device + offset);
}

static void store(uint32_t offset, uint32_t value)
{
	*(volatile uint32_t *)(device + offset) = value;
}

static void print_char(char letter)
{
	__asm__ volatile("outb %0, %1" ::"a"(letter), "Nd"((uint16_t)SERIAL));
}

static void print(const char *text)
{
	while (*text)
		print_char(*text++);
}

static void print_number(uint64_t value)
{
	/* Hexadecimal: division of 64-bit numbers would need a library. */
	for (int shift = 60; shift >= 0; shift -= 4)
		print_char("0123456789abcdef"[value >> shift & 15]);
	print_char(' ');
}

static uint32_t next_number(const char **text)
{
	uint32_t value = 0;

	while (**text && (**text < '0' || **text > '9'))
		(*text)++;
	while (**text >= '0' && **text <= '9')
		value = value * 10 + (uint32_t)(*(*text)++ - '0');
	return value;
}

/* Look for a device of this type where kvmlite and QEMU put them. */
static int find_device(uint32_t id)
{
	static const struct {
		uintptr_t base;
		uint32_t step, count;
	} places[] = {{0xd0000f00, 0x2000, 19}, {0xfeb00000, 0x200, 24}};

	for (unsigned i = 0; i < 2; i++) {
		for (uint32_t n = 0; n < places[i].count; n++) {
			device = places[i].base + places[i].step * n;
			if (load(MAGIC) == 0x74726976 && load(DEVICE_ID) == id)
				return 1;
		}
	}
	return 0;
}

enum { RING_SIZE = 256 };

/* A queue; its three parts lie in 0x4000 bytes from (base) on. */
struct ring {
	uint32_t index;
	volatile struct desc *desc;
	volatile uint16_t *avail, *used;
	uint16_t avail_idx, seen_used, kicked_at;
	uint32_t kicks;
	uint64_t kick_ticks;
};

/* Between FEATURES_OK and DRIVER_OK. */
static void set_up_ring(struct ring *ring, uint32_t index, uint32_t base)
{
	*ring = (struct ring){.index = index, .desc = (void *)base};
	ring->avail = (void *)(base + 0x1000);
	ring->used = (void *)(base + 0x2000);
	store(QUEUE_SEL, index);
	store(QUEUE_NUM, RING_SIZE);
	store(QUEUE_DESC, base);
	store(QUEUE_DESC + 4, 0);
	store(QUEUE_DRIVER, base + 0x1000);
	store(QUEUE_DRIVER + 4, 0);
	store(QUEUE_DEVICE, base + 0x2000);
	store(QUEUE_DEVICE + 4, 0);
	store(QUEUE_READY, 1);
}

static void negotiate(uint32_t features)
{
	store(STATUS, 0);
	store(STATUS, 1);
	store(STATUS, 3);
	store(DRIVER_FEATURES_SEL, 0);
	store(DRIVER_FEATURES, 1u << 29 | features); /* EVENT_IDX */
	store(DRIVER_FEATURES_SEL, 1);
	store(DRIVER_FEATURES, 1); /* VERSION_1 */
	store(STATUS, 11);
}

static void offer(struct ring *ring, uint16_t head)
{
	ring->avail[2 + ring->avail_idx % RING_SIZE] = head;
	ring->avail_idx++;
}

/* Publish what was offered, and kick if the device wants to be told (VIRTIO 1.2, 2.7.10). */
static void publish(struct ring *ring)
{
	uint16_t event, old = ring->kicked_at;

	if (old == ring->avail_idx)
		return;
	__asm__ volatile("" ::: "memory");
	ring->avail[1] = ring->avail_idx;
	__asm__ volatile("lock; addl $0, (%%esp)" ::: "memory");
	event = ring->used[2 + 4 * RING_SIZE];
	ring->kicked_at = ring->avail_idx;
	if ((uint16_t)(ring->avail_idx - event - 1) < (uint16_t)(ring->avail_idx - old)) {
		uint64_t begin = ticks();

		store(QUEUE_NOTIFY, ring->index);
		ring->kick_ticks += ticks() - begin;
		ring->kicks++;
	}
}

/* The next chain that was used, or -1. Never asks for an interrupt. */
static int32_t take(struct ring *ring)
{
	volatile struct used *entries = (volatile void *)(ring->used + 2);

	if (ring->used[1] == ring->seen_used)
		return -1;
	ring->avail[2 + RING_SIZE] = (uint16_t)(ring->seen_used - 1);
	return (int32_t)entries[ring->seen_used++ % RING_SIZE].id;
}

#endif
