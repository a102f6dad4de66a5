/* LZ4 blocks, as in the payload of a kernel (lz4 Block Format Description). */
#ifndef KVL_LZ4_H
#define KVL_LZ4_H

#include <stdint.h>

enum { KVL_LZ4_DAMAGED = -1, KVL_LZ4_FULL = -2 };

/*
 * Decode one whole block of (from_size) bytes into (to). Returns the bytes written; KVL_LZ4_DAMAGED if the block
 * ends inside a sequence or refers to bytes before (to), KVL_LZ4_FULL if it needs more than (to_size) bytes.
 * Reads and writes nothing outside both buffers, whatever they hold. Any thread.
 */
int64_t kvl_lz4_decode_block(const uint8_t *from, uint64_t from_size, uint8_t *to, uint64_t to_size);

#endif
