/* Whole transfers between iovecs and a file: short ones are continued, interrupted ones repeated. 0 or an errno. */
#ifndef KVL_FILEIO_H
#define KVL_FILEIO_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Iovecs that are used up from the front. */
struct kvl_iovecs {
	struct iovec *iov;
	uint32_t count;
};

/* Drop the first (done) bytes, no more than there are. */
void kvl_iovecs_advance(struct kvl_iovecs *iovecs, size_t done);

/*
 * Move (size) bytes at (offset) of a file, no more than the iovecs have. (flags): RWF_*. EIO at the end of the file.
 */
int kvl_file_read(int fd, struct kvl_iovecs *to, uint64_t offset, uint64_t size);
int kvl_file_write(int fd, struct kvl_iovecs *from, uint64_t offset, uint64_t size, int flags);

/* fallocate(2). */
int kvl_file_allocate(int fd, int mode, uint64_t offset, uint64_t size);

/* Have the range of a file read as zeros; with (may_unmap), without keeping its space. */
int kvl_file_zero(int fd, uint64_t offset, uint64_t size, bool may_unmap);

/* Whether an errno says that a file system or device has no such call. */
bool kvl_file_is_unsupported(int error);

#endif
