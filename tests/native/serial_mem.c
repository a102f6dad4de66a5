/*
 * Drives serial.c and mem.c under AddressSanitizer and UBSan: random register accesses and random ranges, judged
 * against a plain model. Exit status 0 and no sanitizer report is a pass.
 */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "mem.h"
#include "serial.h"

static uint64_t seed = 0x9e3779b97f4a7c15u;

static uint64_t next_random(void)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return seed;
}

static void check_serial(void)
{
	static uint8_t buffer[KVL_SERIAL_OUT_SIZE + 1];
	int irq = eventfd(0, EFD_NONBLOCK), notify = eventfd(0, EFD_NONBLOCK);
	struct kvl_serial *serial = malloc(sizeof(*serial)); /* on the heap: overruns are seen */
	uint64_t taken = 0;

	assert(serial && irq >= 0 && notify >= 0);
	assert(kvl_serial_init(serial, irq, notify) == 0);
	for (unsigned i = 0; i < 2000000; i++) {
		uint64_t r = next_random();
		unsigned offset = (unsigned)(r >> 8) % 10;

		switch (r % 5) {
		case 0:
			kvl_serial_read(serial, offset);
			break;
		case 1:
			kvl_serial_write(serial, offset, (uint8_t)(r >> 16));
			break;
		case 2: /* mostly data */
			kvl_serial_write(serial, 0, (uint8_t)(r >> 16));
			break;
		case 3:
			if ((r >> 32) % 64 == 0)
				taken += kvl_serial_take_output(serial, buffer, (uint32_t)(r >> 40) % sizeof(buffer));
			break;
		case 4:
			kvl_serial_put_input(serial, buffer, (uint32_t)(r >> 40) % 300);
			break;
		}
		assert(kvl_serial_room(serial) <= KVL_SERIAL_OUT_SIZE);
	}
	while (kvl_serial_room(serial) < KVL_SERIAL_OUT_SIZE)
		taken += kvl_serial_take_output(serial, buffer, sizeof(buffer));
	assert(taken == serial->out_total);
	kvl_serial_deinit(serial);
	free(serial);
	close(irq);
	close(notify);
}

/* Queue indices are free running: they wrap at 2^32 without losing a byte. */
static void check_serial_wrap(void)
{
	struct kvl_serial *serial = malloc(sizeof(*serial));
	uint8_t out[64];

	assert(serial && kvl_serial_init(serial, -1, -1) == 0);
	serial->out_head = serial->out_tail = serial->in_head = serial->in_tail = UINT32_MAX - 10;
	for (unsigned i = 0; i < 50; i++)
		kvl_serial_write(serial, 0, (uint8_t)i);
	assert(kvl_serial_room(serial) == KVL_SERIAL_OUT_SIZE - 50);
	assert(kvl_serial_take_output(serial, out, sizeof(out)) == 50);
	for (unsigned i = 0; i < 50; i++)
		assert(out[i] == i);
	assert(kvl_serial_put_input(serial, out, 50) == 50);
	for (unsigned i = 0; i < 50; i++)
		assert(kvl_serial_read(serial, 0) == i);
	kvl_serial_deinit(serial);
	free(serial);
}

static bool inside(const struct kvl_mem *mem, uint64_t gpa, uint64_t size)
{
	for (uint32_t i = 0; i < mem->count; i++) {
		__uint128_t start = mem->regions[i].gpa, end = start + mem->regions[i].size;

		if (gpa >= start && gpa < end)
			return (__uint128_t)gpa + size <= end;
	}
	return false;
}

static void check_mem(void)
{
	static const uint64_t places[] = {0, 1, 4095, 4096, 8191, 8192, 0xfffffffffffff000u, UINT64_MAX - 1, UINT64_MAX};
	enum { PLACES = sizeof(places) / sizeof(places[0]) };
	struct kvl_mem mem = {.count = 3};
	uint8_t buffer[64] = {0};

	mem.regions[0] = (struct kvl_region){.gpa = 0, .size = 8192};
	mem.regions[1] = (struct kvl_region){.gpa = 0x100000000u, .size = 4096};
	mem.regions[2] = (struct kvl_region){.gpa = 0xffffffffffffe000u, .size = 4096};
	for (uint32_t i = 0; i < mem.count; i++) {
		mem.regions[i].hva = kvl_mem_map(mem.regions[i].size, -1, 0, false);
		assert(mem.regions[i].hva && ((uintptr_t)mem.regions[i].hva & 0x1fffff) == 0);
	}
	for (unsigned i = 0; i < 1000000; i++) {
		uint64_t r = next_random();
		uint64_t gpa = places[r % PLACES] + ((r >> 8) & 7) - 4 + (((r >> 16) & 1) ? 0x100000000u : 0);
		uint64_t size = ((r >> 20) & 1) ? places[(r >> 24) % PLACES] : (r >> 24) % 64;
		uint8_t *at = kvl_mem_at(&mem, gpa, size);

		assert(!!at == inside(&mem, gpa, size));
		if (size <= sizeof(buffer)) {
			assert((kvl_mem_write(&mem, gpa, buffer, size) == 0) == !!at);
			assert((kvl_mem_read(&mem, gpa, buffer, size) == 0) == !!at);
		}
	}
	for (uint32_t i = 0; i < mem.count; i++)
		assert(kvl_mem_unmap(mem.regions[i].hva, mem.regions[i].size) == 0);
	assert(!kvl_mem_map(UINT64_MAX / 2, -1, 0, false));
}

int main(void)
{
	check_serial();
	check_serial_wrap();
	check_mem();
	puts("ok");
	return 0;
}
