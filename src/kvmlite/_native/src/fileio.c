#define _GNU_SOURCE
#include "fileio.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <unistd.h>

enum { ZEROS_SIZE = 65536 };

/* Page-aligned, so that direct I/O takes it. */
static const uint8_t zeros[ZEROS_SIZE] __attribute__((aligned(4096)));

void kvl_iovecs_advance(struct kvl_iovecs *iovecs, size_t done)
{
	while (iovecs->count && done >= iovecs->iov->iov_len) {
		done -= iovecs->iov->iov_len;
		iovecs->iov++;
		iovecs->count--;
	}
	if (done) {
		iovecs->iov->iov_base = (uint8_t *)iovecs->iov->iov_base + done;
		iovecs->iov->iov_len -= done;
	}
}

/* How many iovecs (size) bytes take, at most IOV_MAX; in (cut), by how much they are longer. */
static int count_iovecs(const struct kvl_iovecs *iovecs, uint64_t size, size_t *cut)
{
	uint64_t total = 0;
	uint32_t count = 0;

	while (count < iovecs->count && count < IOV_MAX && total < size)
		total += iovecs->iov[count++].iov_len;
	*cut = total > size ? (size_t)(total - size) : 0;
	return (int)count;
}

static int move(int fd, struct kvl_iovecs *iovecs, uint64_t offset, uint64_t size, bool is_write, int flags)
{
	while (size) {
		size_t cut;
		ssize_t done;
		int count = count_iovecs(iovecs, size, &cut), error = 0;

		if (!count)
			return EIO;
		iovecs->iov[count - 1].iov_len -= cut;
		done = is_write ? pwritev2(fd, iovecs->iov, count, (off_t)offset, flags)
				: preadv2(fd, iovecs->iov, count, (off_t)offset, flags);
		if (done < 0)
			error = errno;
		iovecs->iov[count - 1].iov_len += cut;
		if (error == EINTR)
			continue;
		if (done <= 0)
			return error ? error : EIO;
		offset += (uint64_t)done;
		size -= (uint64_t)done;
		kvl_iovecs_advance(iovecs, (size_t)done);
	}
	return 0;
}

int kvl_file_read(int fd, struct kvl_iovecs *to, uint64_t offset, uint64_t size)
{
	return move(fd, to, offset, size, false, 0);
}

int kvl_file_write(int fd, struct kvl_iovecs *from, uint64_t offset, uint64_t size, int flags)
{
	return move(fd, from, offset, size, true, flags);
}

int kvl_file_allocate(int fd, int mode, uint64_t offset, uint64_t size)
{
	while (fallocate(fd, mode, (off_t)offset, (off_t)size) < 0) {
		if (errno != EINTR)
			return errno;
	}
	return 0;
}

bool kvl_file_is_unsupported(int error)
{
	return error == EOPNOTSUPP || error == ENOSYS || error == ENOTTY;
}

static int write_zeros(int fd, uint64_t offset, uint64_t size)
{
	while (size) {
		uint64_t step = size < ZEROS_SIZE ? size : ZEROS_SIZE;
		/* SAFETY: a write only reads from its iovecs. */
		struct iovec iov = {.iov_base = (void *)(uintptr_t)zeros, .iov_len = step};
		int error = kvl_file_write(fd, &(struct kvl_iovecs){.iov = &iov, .count = 1}, offset, step, 0);

		if (error)
			return error;
		offset += step;
		size -= step;
	}
	return 0;
}

int kvl_file_zero(int fd, uint64_t offset, uint64_t size, bool may_unmap)
{
	int error = EOPNOTSUPP;

	/* On block devices, fallocate(2) is BLKZEROOUT with and without unmapping. */
	if (may_unmap)
		error = kvl_file_allocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
	if (kvl_file_is_unsupported(error))
		error = kvl_file_allocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, size);
	return kvl_file_is_unsupported(error) ? write_zeros(fd, offset, size) : error;
}
