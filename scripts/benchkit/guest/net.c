/*
 * A guest without a kernel that drives a virtio-net device from ring 3 and counts ticks: what is measured is the
 * monitor's data path and nothing else.
 *
 * Command line: MODE DEPTH SIZE COUNT. MODE 0 sends frames of SIZE bytes, DEPTH at a time; 1 sends each frame back that
 * it is sent, until COUNT have come.
 * Prints "go", and at the end one line in hexadecimal on the first serial port: bench FRAMES TICKS KICKS KICK_TICKS end.
 */
#include "ring3.h"

enum { RX = 0, TX = 1, RX_RING = 0x200000, TX_RING = 0x204000, RX_BUFFERS = 0x1000000, TX_BUFFERS = 0x1100000, ROOM = 4096 };

static struct ring rx, tx;

static void write_frame(uint32_t buffer)
{
	/* Header of zeros; to everybody, from us, of the type that is for experiments. */
	static const uint8_t ethernet[14] = {255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 0x88, 0xb5};

	for (uint32_t i = 0; i < sizeof(ethernet); i++)
		((volatile uint8_t *)buffer)[12 + i] = ethernet[i];
}

static void send_frames(uint32_t depth, uint32_t count)
{
	uint32_t submitted = 0, done = 0;
	int32_t slot;

	for (; submitted < depth; submitted++)
		offer(&tx, (uint16_t)submitted);
	while (done < count) {
		publish(&tx);
		while ((slot = take(&tx)) < 0)
			__asm__ volatile("pause");
		do {
			done++;
			if (submitted++ < count)
				offer(&tx, (uint16_t)slot);
		} while ((slot = take(&tx)) >= 0);
	}
}

static void echo_frames(uint32_t count)
{
	uint32_t done = 0;

	while (done < count) {
		int32_t slot = take(&rx);

		if (slot >= 0) {
			const volatile uint8_t *frame = (void *)(RX_BUFFERS + ROOM * (uint32_t)slot);
			int is_ours = frame[12 + 12] == 0x88 && frame[12 + 13] == 0xb5;

			offer(&rx, (uint16_t)slot);
			publish(&rx);
			if (!is_ours)
				continue; /* the host's own chatter */
			offer(&tx, (uint16_t)(done % 64));
			publish(&tx);
			done++;
		}
		while (take(&tx) >= 0)
			;
		__asm__ volatile("pause");
	}
}

__attribute__((used)) void guest_main(const uint64_t *start_info);
void guest_main(const uint64_t *start_info)
{
	const char *text = (const char *)(uintptr_t)start_info[3];
	uint32_t mode = next_number(&text), depth = next_number(&text), size = next_number(&text);
	uint32_t count = next_number(&text);
	uint64_t begin;

	if (!find_device(1)) {
		print("no device\n");
		return;
	}
	negotiate(1u << 15); /* MRG_RXBUF */
	set_up_ring(&rx, RX, RX_RING);
	set_up_ring(&tx, TX, TX_RING);
	store(STATUS, 15);
	for (uint32_t i = 0; i < 64; i++) {
		rx.desc[i] = (struct desc){.addr = RX_BUFFERS + ROOM * i, .len = ROOM, .flags = F_WRITE};
		tx.desc[i] = (struct desc){.addr = TX_BUFFERS + ROOM * i, .len = 12 + size};
		write_frame(TX_BUFFERS + ROOM * i);
		offer(&rx, (uint16_t)i);
	}
	publish(&rx);
	print("go\n");
	begin = ticks();
	if (mode == 0)
		send_frames(depth, count);
	else
		echo_frames(count);
	begin = ticks() - begin;
	print("bench ");
	print_number(count);
	print_number(begin);
	print_number(rx.kicks + tx.kicks);
	print_number(rx.kick_ticks + tx.kick_ticks);
	print("end\n");
}
