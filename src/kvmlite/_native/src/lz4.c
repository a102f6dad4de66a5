#include "lz4.h"

#include <string.h>

enum { RUN = 15, MIN_MATCH = 4, WIDE = 16 };

/* Add the bytes that extend a length of 15: each 255 means that another follows. -1 if the input ends first. */
static int extend(const uint8_t **at, const uint8_t *end, uint64_t *ret_length)
{
	uint8_t byte;

	do {
		if (*at == end)
			return -1;
		byte = *(*at)++;
		*ret_length += byte; /* cannot wrap: at most 255 per byte of input */
	} while (byte == 255);
	return 0;
}

/* Copy a match of (length) bytes from (distance) bytes back; (room) bytes of the buffer start at (out). */
static void copy_match(uint8_t *out, uint64_t distance, uint64_t length, uint64_t room)
{
	const uint8_t *match = out - distance;

	if (distance >= WIDE && room - length >= WIDE) {
		/* Whole steps: writes up to 15 bytes too many, which later sequences overwrite. */
		for (uint64_t done = 0; done < length; done += WIDE)
			memcpy(out + done, match + done, WIDE);
		return;
	}
	if (distance == 1) {
		memset(out, *match, length);
		return;
	}
	/* Source and destination overlap on purpose: a short distance repeats. */
	for (uint64_t i = 0; i < length; i++)
		out[i] = match[i];
}

int64_t kvl_lz4_decode_block(const uint8_t *from, uint64_t from_size, uint8_t *to, uint64_t to_size)
{
	const uint8_t *at = from, *const end = from + from_size;
	uint8_t *out = to, *const out_end = to + to_size;

	while (at < end) {
		const uint8_t token = *at++;
		uint64_t literals = token >> 4, length = token & 15, distance;

		if (literals == RUN && extend(&at, end, &literals))
			return KVL_LZ4_DAMAGED;
		if (literals > (uint64_t)(end - at))
			return KVL_LZ4_DAMAGED;
		if (literals > (uint64_t)(out_end - out))
			return KVL_LZ4_FULL;
		if (literals <= WIDE && end - at >= WIDE && out_end - out >= WIDE)
			memcpy(out, at, WIDE); /* the usual case: one fixed-size copy */
		else if (literals)
			memcpy(out, at, literals);
		at += literals;
		out += literals;
		if (at == end) /* the last sequence has literals only */
			return out - to;

		if (end - at < 2)
			return KVL_LZ4_DAMAGED;
		distance = (uint64_t)at[0] | (uint64_t)at[1] << 8;
		at += 2;
		if (length == RUN && extend(&at, end, &length))
			return KVL_LZ4_DAMAGED;
		length += MIN_MATCH;
		if (distance == 0 || distance > (uint64_t)(out - to))
			return KVL_LZ4_DAMAGED;
		if (length > (uint64_t)(out_end - out))
			return KVL_LZ4_FULL;
		copy_match(out, distance, length, (uint64_t)(out_end - out));
		out += length;
	}
	return KVL_LZ4_DAMAGED; /* empty, or ended after a match */
}
