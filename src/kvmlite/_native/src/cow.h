/*
 * A copy-on-write layer: what was written is in a sparse file of its own, all else is read from a base that nobody
 * writes to. A bit per cluster says where to look; clusters are of a page, so that few writes have to copy from the base
 * and a bitmap for 64 GiB has 2 MiB. Nothing of it is kept: there is no format.
 */
#ifndef KVL_COW_H
#define KVL_COW_H

#include <pthread.h>
#include <stdint.h>

#include "fileio.h"

enum { KVL_COW_CLUSTER = 4096 };

/* Shared by all workers of a disk. Descriptors and memory are the caller's. */
struct kvl_cow {
	int base_fd, top_fd;
	uint64_t size;         /* bytes of the disk */
	uint64_t *written;     /* atomic; bit n % 64 of word n / 64: cluster n is in the top file */
	pthread_mutex_t lock;  /* held while bits are set */
};

/* (written): zeros, a bit for each begun cluster. */
void kvl_cow_init(struct kvl_cow *cow, int base_fd, int top_fd, uint64_t size, uint64_t *written);

/* Offsets and sizes are inside the disk. 0 or an errno. */
int kvl_cow_read(struct kvl_cow *cow, struct kvl_iovecs *to, uint64_t offset, uint64_t size);
int kvl_cow_write(struct kvl_cow *cow, struct kvl_iovecs *from, uint64_t offset, uint64_t size);
int kvl_cow_zero(struct kvl_cow *cow, uint64_t offset, uint64_t size);

#endif
