#define _GNU_SOURCE
#include "disk.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "virtq.h"

void kvl_bounce_init(struct kvl_bounce *bounce, uint8_t *buffer, uint64_t size)
{
	memset(bounce, 0, sizeof(*bounce));
	pthread_mutex_init(&bounce->lock, NULL);
	bounce->buffer = buffer;
	bounce->size = size;
}

bool kvl_disk_takes(const struct kvl_disk *disk, const struct iovec *iov, uint32_t count)
{
	for (uint32_t i = 0; disk->memory_align && i < count; i++) {
		if ((uintptr_t)iov[i].iov_base % disk->memory_align || iov[i].iov_len % disk->memory_align)
			return false;
	}
	return true;
}

int kvl_disk_write_flags(const struct kvl_disk *disk, bool durable)
{
	return durable && !disk->is_private ? RWF_DSYNC : 0;
}

bool kvl_disk_is_stopping(const struct kvl_disk *disk)
{
	return __atomic_load_n(&disk->is_stopping, __ATOMIC_RELAXED);
}

/* A part of a long request, which ends at a multiple of the step's size: no block of the file system, no cluster is cut. */
struct step {
	uint64_t offset, size; /* no size: there is none left */
	uint64_t end;          /* of the request */
};

static struct step step_at(const struct kvl_disk *disk, uint64_t offset, uint64_t end)
{
	uint64_t most = disk->step_size - (offset & (disk->step_size - 1));

	return (struct step){.offset = offset, .size = end - offset < most ? end - offset : most, .end = end};
}

/* To the next step, after one that came to (error); 0 or an errno. */
static int advance(const struct kvl_disk *disk, struct step *step, int error)
{
	*step = step_at(disk, step->offset + step->size, step->end);
	return !error && step->size && kvl_disk_is_stopping(disk) ? ECANCELED : error;
}

/* Move the data through an aligned buffer. */
static int move_bounced(const struct kvl_disk *disk, const struct iovec *iov, uint32_t count, uint64_t offset,
			uint64_t size, bool is_write, int flags)
{
	struct kvl_bounce *bounce = disk->bounce;
	int error = 0;

	pthread_mutex_lock(&bounce->lock);
	for (uint64_t done = 0; done < size && !error;) {
		uint64_t step = size - done < bounce->size ? size - done : bounce->size;
		struct iovec part = {.iov_base = bounce->buffer, .iov_len = step};
		struct kvl_iovecs parts = {.iov = &part, .count = 1};

		if (is_write) {
			kvl_iov_read(iov, count, done, bounce->buffer, step);
			error = kvl_file_write(disk->fd, &parts, offset + done, step, flags);
		} else {
			error = kvl_file_read(disk->fd, &parts, offset + done, step);
			if (!error)
				kvl_iov_write(iov, count, done, bounce->buffer, step);
		}
		done += step;
		if (!error && done < size && !(done & (disk->step_size - 1)) && kvl_disk_is_stopping(disk))
			error = ECANCELED;
	}
	pthread_mutex_unlock(&bounce->lock);
	return error;
}

int kvl_disk_read(const struct kvl_disk *disk, struct iovec *iov, uint32_t count, uint64_t offset, uint64_t size)
{
	struct kvl_iovecs to = {.iov = iov, .count = count};
	struct step step = step_at(disk, offset, offset + size);
	int error = 0;

	if (!disk->cow && !kvl_disk_takes(disk, iov, count))
		return move_bounced(disk, iov, count, offset, size, false, 0);
	while (step.size && !error) {
		if (disk->cow)
			error = kvl_cow_read(disk->cow, &to, step.offset, step.size);
		else
			error = kvl_file_read(disk->fd, &to, step.offset, step.size);
		error = advance(disk, &step, error);
	}
	return error;
}

int kvl_disk_write(const struct kvl_disk *disk, struct iovec *iov, uint32_t count, uint64_t offset, uint64_t size,
		   bool durable)
{
	struct kvl_iovecs from = {.iov = iov, .count = count};
	struct step step = step_at(disk, offset, offset + size);
	int flags = kvl_disk_write_flags(disk, durable), error = 0;

	if (!disk->cow && !kvl_disk_takes(disk, iov, count))
		return move_bounced(disk, iov, count, offset, size, true, flags);
	while (step.size && !error) {
		if (disk->cow)
			error = kvl_cow_write(disk->cow, &from, step.offset, step.size);
		else
			error = kvl_file_write(disk->fd, &from, step.offset, step.size, flags);
		error = advance(disk, &step, error);
	}
	return error;
}

int kvl_disk_flush(const struct kvl_disk *disk)
{
	if (disk->is_private)
		return 0;
	while (fdatasync(disk->fd) < 0) {
		if (errno != EINTR)
			return errno;
	}
	return 0;
}

static int discard_step(const struct kvl_disk *disk, uint64_t offset, uint64_t size)
{
	uint64_t range[2] = {offset, size};
	int error;

	if (disk->cow)
		return kvl_cow_zero(disk->cow, offset, size);
	if (disk->is_device)
		error = ioctl(disk->fd, BLKDISCARD, range) < 0 ? errno : 0;
	else
		error = kvl_file_allocate(disk->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
	return kvl_file_is_unsupported(error) ? 0 : error;
}

int kvl_disk_discard(const struct kvl_disk *disk, uint64_t offset, uint64_t size)
{
	struct step step = step_at(disk, offset, offset + size);
	int error = 0;

	while (step.size && !error)
		error = advance(disk, &step, discard_step(disk, step.offset, step.size));
	return error;
}

int kvl_disk_zero(const struct kvl_disk *disk, uint64_t offset, uint64_t size, bool may_unmap)
{
	struct step step = step_at(disk, offset, offset + size);
	int error = 0;

	while (step.size && !error) {
		if (disk->cow)
			error = kvl_cow_zero(disk->cow, step.offset, step.size);
		else
			error = kvl_file_zero(disk->fd, step.offset, step.size, may_unmap);
		error = advance(disk, &step, error);
	}
	return error;
}
