/*
 * A guest without a kernel that drives a virtio-blk device from ring 3 and counts ticks: what is measured is the
 * monitor's data path and nothing else.
 *
 * Command line: DEPTH SIZE WRITE SPAN COUNT: requests in flight, bytes of each, 0 or 1, sectors of the disk to use, requests.
 * Prints "go", and at the end one line in hexadecimal on the first serial port: bench REQUESTS TICKS KICKS KICK_TICKS end.
 */
#include "ring3.h"

enum {
	RING = 0x200000,
	HEADERS = 0x206000, /* 16 bytes each */
	STATUSES = 0x208000,
	BUFFERS = 0x1000000,
	MAX_DEPTH = RING_SIZE / 3,
};

struct header {
	uint32_t type, ioprio;
	uint64_t sector;
};

static volatile struct header *const headers = (void *)HEADERS;
static volatile uint8_t *const statuses = (void *)STATUSES;
static struct ring ring;
static uint32_t random_state = 2463534242u;

static uint32_t draw(void)
{
	random_state ^= random_state << 13;
	random_state ^= random_state >> 17;
	random_state ^= random_state << 5;
	return random_state;
}

/* Slot (i) has descriptors 3i to 3i + 2. */
static void prepare(uint32_t slot, uint32_t size, uint32_t write)
{
	volatile struct desc *desc = &ring.desc[3 * slot];

	headers[slot].type = write;
	desc[0].addr = HEADERS + sizeof(struct header) * slot;
	desc[0].len = sizeof(struct header);
	desc[0].flags = F_NEXT;
	desc[0].next = (uint16_t)(3 * slot + 1);
	desc[1].addr = BUFFERS + size * slot;
	desc[1].len = size;
	desc[1].flags = (uint16_t)(F_NEXT | (write ? 0 : F_WRITE));
	desc[1].next = (uint16_t)(3 * slot + 2);
	desc[2].addr = STATUSES + slot;
	desc[2].len = 1;
	desc[2].flags = F_WRITE;
}

static void submit(uint32_t slot, uint32_t blocks, uint32_t sectors)
{
	headers[slot].sector = (uint64_t)(draw() % blocks) * sectors;
	statuses[slot] = 0xff;
	offer(&ring, (uint16_t)(3 * slot));
}

__attribute__((used)) void guest_main(const uint64_t *start_info);
void guest_main(const uint64_t *start_info)
{
	const char *text = (const char *)(uintptr_t)start_info[3];
	uint32_t depth = next_number(&text), size = next_number(&text), write = next_number(&text);
	uint32_t span = next_number(&text), count = next_number(&text), submitted = 0, done = 0;
	uint32_t sectors = size / 512;
	uint64_t begin;

	if (!find_device(2) || !depth || depth > MAX_DEPTH) {
		print("no disk, or not so many requests\n");
		return;
	}
	negotiate(1u << 9); /* FLUSH: writes need not be durable */
	set_up_ring(&ring, 0, RING);
	store(STATUS, 15);
	for (uint32_t slot = 0; slot < depth; slot++)
		prepare(slot, size, write);
	print("go\n");
	begin = ticks();
	for (; submitted < depth; submitted++)
		submit(submitted, span / sectors, sectors);
	while (done < count) {
		int32_t head;

		publish(&ring);
		while ((head = take(&ring)) < 0)
			__asm__ volatile("pause");
		do {
			uint32_t slot = (uint32_t)head / 3;

			done++;
			if (statuses[slot]) {
				print("a request failed\n");
				return;
			}
			if (submitted < count) {
				submit(slot, span / sectors, sectors);
				submitted++;
			}
		} while ((head = take(&ring)) >= 0);
	}
	begin = ticks() - begin;
	print("bench ");
	print_number(done);
	print_number(begin);
	print_number(ring.kicks);
	print_number(ring.kick_ticks);
	print("end\n");
}
