/*
 * Fuzzes the egress filter. It aborts if a frame is allowed that a second, stricter reading finds no reason for. Each
 * frame lies at the end of its own allocation: a read behind it is found.
 *
 * Under libFuzzer (-DKVL_LIBFUZZER) the input is a virtio_net_hdr of 10 bytes and a frame, which comes without the
 * header if bit 1 of its flags is set. Without it, main(seed, cases) makes frames that look right, breaks them here and there, and
 * prints how many were allowed, and how many of these came with a header.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "egress.h"

enum { FRAME_MAX = KVL_EGRESS_HEAD };

static void require(int condition, const char *what)
{
	if (!condition) {
		fprintf(stderr, "fuzz_egress: %s\n", what);
		abort();
	}
}

/* From 10.0.2.15: to 10.1.2.0/24 port 443, 2001:db8::/33, and TCP replies from port 80. */
static const struct kvl_egress egress = {
	.rule_count = 2,
	.reply_count = 1,
	.has_source = true,
	.source = {10, 0, 2, 15},
	.rules = {{.family = 4, .prefix_size = 24, .port = 443, .address = {10, 1, 2}},
		  {.family = 6, .prefix_size = 33, .address = {0x20, 0x01, 0x0d, 0xb8}}},
	.reply_ports = {80},
};

#ifndef KVL_LIBFUZZER
static uint64_t state;

static uint32_t draw(uint32_t below)
{
	state = state * UINT64_C(6364136223846793005) + 1442695040888963407u;
	return (uint32_t)((state >> 33) % below);
}

static uint8_t draw_byte(void)
{
	return (uint8_t)draw(256);
}

static void fill_ipv4(uint8_t *ip)
{
	static const uint8_t protocols[4] = {6, 17, 1, 47};
	static const uint8_t targets[4][4] = {{10, 1, 2, 9}, {10, 1, 3, 9}, {255, 255, 255, 255}, {127, 0, 0, 1}};

	ip[0] = 0x45;
	ip[6] = ip[7] = 0;
	ip[9] = protocols[draw(4)];
	memcpy(ip + 12, draw(8) ? "\x0a\x00\x02\x0f" : "\0\0\0\0", 4);
	memcpy(ip + 16, targets[draw(4)], 4);
}

static void fill_ipv6(uint8_t *ip)
{
	static const uint8_t protocols[6] = {6, 17, 58, 0, 44, 60};
	static const uint8_t targets[5][4] = {
		{0x20, 1, 0x0d, 0xb8}, {0x20, 1, 0x0d, 0xb9}, {0xfe, 0x80}, {0xff, 2}, {0xfe, 0xc0}};

	ip[0] = 0x60;
	ip[6] = protocols[draw(6)];
	memset(ip + 24, 0, 16);
	memcpy(ip + 24, targets[draw(5)], 4);
	ip[28] = (uint8_t)(draw(4) ? 0 : 0x80);
}

static void fill_transport(uint8_t *at)
{
	static const uint8_t ports[6][2] = {{1, 187}, {0, 67}, {0, 80}, {0, 68}, {2, 34}, {2, 35}};
	static const uint8_t types[4] = {133, 135, 136, 128};

	if (draw(2)) {
		memcpy(at, ports[draw(6)], 2);
		memcpy(at + 2, ports[draw(6)], 2);
	} else {
		at[0] = types[draw(4)];
	}
	at[13] = (uint8_t)(draw(2) ? 0x02 : 0x12);
}

static void fill_frame(uint8_t *frame)
{
	static const uint8_t types[5][2] = {{8, 0}, {0x86, 0xdd}, {8, 6}, {0x81, 0}, {0, 64}};
	uint32_t kind = draw(20);
	const uint8_t *type = types[kind < 9 ? 0 : kind < 17 ? 1 : kind - 15];

	for (unsigned i = 0; i < FRAME_MAX; i++)
		frame[i] = draw_byte();
	memcpy(frame + 12, type, 2);
	if (type == types[0])
		fill_ipv4(frame + 14);
	else
		fill_ipv6(frame + 14);
	fill_transport(frame + (type == types[0] ? 34 : 54));
	for (uint32_t broken = draw(3) ? 0 : draw(4); broken > 0; broken--)
		frame[draw(80)] = draw_byte();
}

static void fill_header(struct virtio_net_hdr *header)
{
	static const uint16_t starts[4] = {34, 54, 14, 30}, offsets[4] = {16, 6, 0, 18};
	static const uint8_t gso[6] = {0, 5, 1, 3, 4, 0x81};

	header->flags = (uint8_t)draw(2);
	header->gso_type = gso[draw(6)];
	header->csum_start = starts[draw(4)];
	header->csum_offset = offsets[draw(4)];
}

#endif

static int is_for(const uint8_t *at, const char *bytes, size_t size)
{
	return memcmp(at, bytes, size) == 0;
}

/* Why this frame may pass; read anew, straight from offsets. */
static int has_reason(const uint8_t *frame, size_t size)
{
	const uint8_t *ip = frame + 14;
	int is_tcp, is_udp;

	if (is_for(frame + 12, "\x08\x06", 2))
		return 1;
	if (is_for(frame + 12, "\x08\x00", 2) && size >= 14 + 20 + 8) {
		const uint8_t *at = ip + 20;

		is_tcp = ip[9] == 6 && size >= 14 + 20 + 20;
		is_udp = ip[9] == 17;
		if (ip[0] != 0x45 || (ip[6] & 0x3f) != 0 || ip[7] != 0)
			return 0;
		if (is_for(ip + 12, "\0\0\0\0", 4))
			return is_udp && is_for(at, "\x00\x44\x00\x43", 4) && is_for(ip + 16, "\xff\xff\xff\xff", 4);
		if (!is_for(ip + 12, "\x0a\x00\x02\x0f", 4))
			return 0;
		return ((is_tcp || is_udp) && is_for(ip + 16, "\x0a\x01\x02", 3) && is_for(at + 2, "\x01\xbb", 2)) ||
		       (is_tcp && is_for(at, "\x00\x50", 2) && (at[13] & 0x12) != 0x02) ||
		       (is_udp && is_for(at, "\x00\x44\x00\x43", 4) && is_for(ip + 16, "\xff\xff\xff\xff", 4));
	}
	if (is_for(frame + 12, "\x86\xdd", 2) && size >= 14 + 40 + 8) {
		const uint8_t *at = ip + 40;
		int is_icmp = ip[6] == 58;

		is_tcp = ip[6] == 6 && size >= 14 + 40 + 20;
		is_udp = ip[6] == 17;
		if (ip[0] >> 4 != 6 || !(is_tcp || is_udp || is_icmp))
			return 0;
		return (is_for(ip + 24, "\x20\x01\x0d\xb8", 4) && ip[28] < 0x80) ||
		       (is_tcp && is_for(at, "\x00\x50", 2) && (at[13] & 0x12) != 0x02) ||
		       (is_udp && is_for(at, "\x02\x22\x02\x23", 4) &&
			is_for(ip + 24, "\xff\x02\0\0\0\0\0\0\0\0\0\0\0\x01\0\x02", 16)) ||
		       (is_icmp && (at[0] == 133 || at[0] == 135 || at[0] == 136) &&
			(is_for(ip + 24, "\xff\x02", 2) || (ip[24] == 0xfe && ip[25] >> 6 == 2)));
	}
	return 0;
}

static int is_header_honest(const struct virtio_net_hdr *header, const uint8_t *frame)
{
	int is_ipv6 = frame[12] == 0x86;
	uint8_t protocol = frame[14 + (is_ipv6 ? 6 : 9)], gso = header->gso_type & 0x7f;

	if (frame[12] == 8 && frame[13] == 6)
		return header->flags == 0 && header->gso_type == 0;
	if ((header->flags & 1) &&
	    (header->csum_start != (is_ipv6 ? 54 : 34) || header->csum_offset != (protocol == 6 ? 16 : 6) || protocol == 58))
		return 0;
	return gso == 0 || (protocol == 6 && gso == (is_ipv6 ? 4 : 1)) || (protocol == 17 && gso == 5);
}

/* Ask about a frame; whether it is allowed. */
static int judge(const struct virtio_net_hdr *header, const uint8_t *frame, size_t size)
{
	uint8_t *copy = malloc(size + 1);
	int is_allowed;

	require(copy != NULL, "out of memory");
	memcpy(copy + 1, frame, size);
	is_allowed = kvl_egress_allows(&egress, header, copy + 1, size);
	free(copy);
	if (is_allowed) {
		require(size >= 14 && has_reason(frame, size), "allowed without a reason");
		require(header == NULL || is_header_honest(header, frame), "allowed to write elsewhere");
	}
	return is_allowed;
}

#ifdef KVL_LIBFUZZER
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct virtio_net_hdr header;
	uint8_t frame[FRAME_MAX] = {0};

	if (size < sizeof(header))
		return 0;
	memcpy(&header, data, sizeof(header));
	size -= sizeof(header);
	if (size > FRAME_MAX)
		size = FRAME_MAX;
	memcpy(frame, data + sizeof(header), size);
	judge(header.flags & 2 ? NULL : &header, frame, size);
	return 0;
}
#else
int main(int argc, char **argv)
{
	unsigned long cases = argc > 2 ? strtoul(argv[2], NULL, 10) : 0, allowed = 0, with_header = 0;
	uint8_t frame[FRAME_MAX];

	state = argc > 1 ? strtoul(argv[1], NULL, 10) : 0;
	for (unsigned long i = 0; i < cases; i++) {
		size_t size = draw(4) ? FRAME_MAX : draw(FRAME_MAX);
		struct virtio_net_hdr header = {0};
		int is_bare = draw(2) == 0;

		fill_frame(frame);
		fill_header(&header);
		if (judge(is_bare ? NULL : &header, frame, size)) {
			allowed++;
			with_header += !is_bare;
		}
	}
	printf("%lu %lu\n", allowed, with_header);
	return 0;
}
#endif
