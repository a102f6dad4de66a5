/*
 * One request of virtio-blk (VIRTIO 1.2, 5.2.6): taken off its chain, judged, done at once.
 *
 * The header is copied once and the copy is judged. Data goes between the guest's buffers and the disk without a copy.
 */
#ifndef KVL_BLK_REQUEST_H
#define KVL_BLK_REQUEST_H

#include <stdbool.h>
#include <stdint.h>

#include "bucket.h"
#include "disk.h"
#include "virtq.h"

enum {
	KVL_BLK_SECTOR = 512,
	KVL_BLK_ID_SIZE = 20,
	KVL_BLK_MAX_SEGMENTS = 16,             /* of one discard or write-zeroes */
	KVL_BLK_MAX_DISCARD_SECTORS = 1 << 21, /* 1 GiB in one segment */
	KVL_BLK_MAX_ZERO_SECTORS = 1 << 17,    /* 64 MiB: they are written where the host cannot do better */
};

/* Of a disk, the same for all its queues. Written before the workers run, then only read. */
struct kvl_blk_config {
	struct kvl_disk *disk;
	struct kvl_limiter *limiter; /* or NULL */
	bool is_read_only;
	bool has_flush;      /* the driver flushes; if it does not, each write is made durable */
	uint32_t block_size; /* bytes; the image takes no smaller pieces */
	uint8_t id[KVL_BLK_ID_SIZE];
};

struct kvl_blk_stats {
	uint64_t reads, writes, flushes, others;
	uint64_t read_bytes, written_bytes;
	uint64_t refused; /* requests with UNSUPP, or IOERR because of what they ask for */
	uint64_t failed;  /* requests with IOERR because of the host */
	uint64_t interrupts;
	uint64_t pauses; /* times the limiter made it wait */
};

/* Header and status aside, the data: iovecs of the chain. */
struct kvl_blk_request {
	uint32_t type;
	uint16_t head;
	uint64_t sector;
	struct iovec *readable, *writable;
	uint32_t readable_count, writable_count;
	uint64_t readable_size, writable_size;
	uint8_t *status;
};

struct kvl_blk_answer {
	uint8_t status;   /* VIRTIO_BLK_S_* */
	int error;        /* errno of the host, or 0 */
	uint64_t written; /* bytes of data stored, from the first writable one on */
};

/* Take a request off its chain. False breaks the queue: there is nowhere to say what is wrong. */
bool kvl_blk_parse(struct kvl_virtq *queue, struct kvl_chain *chain, struct kvl_blk_request *ret);

/* Bytes a read or write moves; 0 for others. */
uint64_t kvl_blk_data_size(const struct kvl_blk_request *request);

/* Count a read, write or flush, and judge it; if it may not be done, false and the answer. */
bool kvl_blk_admit(const struct kvl_blk_config *config, struct kvl_blk_stats *stats,
		   const struct kvl_blk_request *request, struct kvl_blk_answer *ret);

/* The answer to what was admitted and came to an end with (error), an errno or 0. */
struct kvl_blk_answer kvl_blk_conclude(struct kvl_blk_stats *stats, const struct kvl_blk_request *request, int error);

/* Do a request of any type here and now. */
struct kvl_blk_answer kvl_blk_serve(const struct kvl_blk_config *config, struct kvl_blk_stats *stats,
				    const struct kvl_blk_request *request);

/* Store the status and give the chain back. */
void kvl_blk_complete(struct kvl_virtq *queue, const struct kvl_blk_request *request,
		      const struct kvl_blk_answer *answer);

#endif
