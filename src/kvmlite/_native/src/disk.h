/*
 * What is behind a virtual disk: a raw image file or a block device, or a private overlay on one, read and written from
 * the buffers of its requests. Offsets and sizes are bytes and inside the disk: the caller has checked. Functions return
 * 0 or an errno.
 */
#ifndef KVL_DISK_H
#define KVL_DISK_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "cow.h"

/* Written by Python before any worker runs, then only read, but for (is_stopping). Descriptors and memory are the caller's. */
struct kvl_disk {
	int fd;          /* with an overlay, where what was written is */
	uint64_t size;   /* a multiple of the block size */
	bool is_device;  /* a block device, not a file */
	bool is_private; /* nobody sees it after this machine: nothing is ever made durable */
	uint64_t step_size;          /* bytes moved or cleared at a time, at most: a power of two */
	uint32_t is_stopping;        /* any thread: who is at more than one step leaves the others, with ECANCELED */
	struct kvl_cow *cow;         /* NULL without an overlay */
	uint32_t memory_align;       /* of buffers, with direct I/O; 0 without */
	struct kvl_bounce *bounce;   /* for those that are not aligned so */
};

/* A buffer for direct I/O, one request at a time. */
struct kvl_bounce {
	pthread_mutex_t lock;
	uint8_t *buffer; /* page-aligned */
	uint64_t size;   /* a multiple of the block size */
};

void kvl_bounce_init(struct kvl_bounce *bounce, uint8_t *buffer, uint64_t size);

/*
 * Move (size) bytes between (count) iovecs and (offset). The iovecs are used up on the way. With (durable), the data is
 * on the medium when a write returns. EIO if the file has become shorter than the disk. ECANCELED: see (is_stopping).
 */
int kvl_disk_read(const struct kvl_disk *disk, struct iovec *iov, uint32_t count, uint64_t offset, uint64_t size);
int kvl_disk_write(const struct kvl_disk *disk, struct iovec *iov, uint32_t count, uint64_t offset, uint64_t size,
		   bool durable);

/* For who moves the data itself: whether (fd) takes these buffers, and the RWF_* of a write. Not with an overlay. */
bool kvl_disk_takes(const struct kvl_disk *disk, const struct iovec *iov, uint32_t count);
int kvl_disk_write_flags(const struct kvl_disk *disk, bool durable);

bool kvl_disk_is_stopping(const struct kvl_disk *disk);

/* Have all writes that returned on the medium. */
int kvl_disk_flush(const struct kvl_disk *disk);

/* Nobody needs these bytes any more: give their space back where that can be done, else do nothing. */
int kvl_disk_discard(const struct kvl_disk *disk, uint64_t offset, uint64_t size);

/* Have the range read as zeros; with (may_unmap), without keeping its space. */
int kvl_disk_zero(const struct kvl_disk *disk, uint64_t offset, uint64_t size, bool may_unmap);

#endif
