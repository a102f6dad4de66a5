/*
 * Feeds the LZ4 decoder damaged blocks under AddressSanitizer: every buffer is exactly as long as announced, so that a
 * byte read or written outside is caught. Prints what it did; any finding ends it.
 */
#include "lz4.h"

#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* The first two bytes are the room, the rest is the block. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (size < 2)
		return 0;
	uint64_t room = (uint64_t)(data[0] | data[1] << 8) % 20000;
	uint8_t *block = malloc(size - 2 ? size - 2 : 1), *to = malloc(room ? room : 1);

	assert(block && to);
	memcpy(block, data + 2, size - 2);
	int64_t made = kvl_lz4_decode_block(block, size - 2, to, room);
	assert(made >= KVL_LZ4_FULL && made <= (int64_t)room);
	free(block);
	free(to);
	return made >= 0;
}

#ifndef LIBFUZZER
static uint64_t state = 88172645463325252ULL;

static uint64_t next(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

/* A block that is valid until the last touch: literals and matches with all ways to write a length. */
static size_t make_block(uint8_t *block, size_t size, size_t *ret_made)
{
	size_t at = 0, made = 0;

	while (at + 64 < size) {
		uint8_t literals = next() % 16, match = next() % 16;
		size_t extra = literals == 15 ? next() % 20 : 0;

		block[at++] = (uint8_t)(literals << 4 | match);
		if (literals == 15)
			block[at++] = (uint8_t)extra;
		for (size_t i = 0; i < literals + extra; i++)
			block[at++] = (uint8_t)next();
		made += literals + extra;
		if (!made) { /* nothing to refer to yet */
			at--;
			continue;
		}
		size_t distance = 1 + next() % (made < 65535 ? made : 65535);
		block[at++] = (uint8_t)distance;
		block[at++] = (uint8_t)(distance >> 8);
		made += 4u + match;
		if (match == 15) {
			block[at] = 255;
			block[at + 1] = (uint8_t)(next() % 255);
			made += 255u + block[at + 1];
			at += 2;
		}
	}
	block[at++] = 0x10;
	block[at++] = 'x';
	*ret_made = made + 1;
	return at;
}

int main(int argc, char **argv)
{
	unsigned long rounds = argc > 1 ? strtoul(argv[1], NULL, 10) : 1000, good = 0;
	uint8_t data[602];

	for (unsigned long round = 0; round < rounds; round++) {
		size_t made = 0, size = 2 + make_block(data + 2, 66 + next() % 500, &made);
		size_t room = made + next() % 20 - (next() % 4 == 0 ? next() % 20 : 0);

		data[0] = (uint8_t)room;
		data[1] = (uint8_t)(room >> 8);
		for (unsigned touches = (unsigned)(next() % 4); touches; touches--)
			data[2 + next() % (size - 2)] = (uint8_t)next();
		if (next() % 4 == 0)
			size = 2 + next() % (size - 1);
		good += (unsigned long)LLVMFuzzerTestOneInput(data, size);
	}
	printf("%lu blocks, %lu decoded\n", rounds, good);
	return 0;
}
#endif
