#include "cow.h"

#include <stdbool.h>
#include <string.h>

void kvl_cow_init(struct kvl_cow *cow, int base_fd, int top_fd, uint64_t size, uint64_t *written)
{
	memset(cow, 0, sizeof(*cow));
	cow->base_fd = base_fd;
	cow->top_fd = top_fd;
	cow->size = size;
	cow->written = written;
	pthread_mutex_init(&cow->lock, NULL);
}

/* Acquire: pairs with mark_written, so that what the bit promises is in the file. */
static bool is_written(const struct kvl_cow *cow, uint64_t cluster)
{
	return __atomic_load_n(&cow->written[cluster / 64], __ATOMIC_ACQUIRE) >> cluster % 64 & 1;
}

/* The first cluster after (first), which was seen in (state), that is in the other one; at most (end). */
static uint64_t run_end(const struct kvl_cow *cow, uint64_t first, uint64_t end, bool state)
{
	do
		first++;
	while (first < end && is_written(cow, first) == state);
	return first;
}

static void mark_written(struct kvl_cow *cow, uint64_t first, uint64_t end)
{
	while (first < end) {
		uint64_t word = first / 64, bit = first % 64, count = 64 - bit;
		uint64_t bits;

		if (count > end - first)
			count = end - first;
		bits = (count == 64 ? UINT64_MAX : (UINT64_C(1) << count) - 1) << bit;
		__atomic_fetch_or(&cow->written[word], bits, __ATOMIC_RELEASE);
		first += count;
	}
}

/* Copy a cluster from the base, unless it is in the top file already. With the lock. */
static int fill(struct kvl_cow *cow, uint64_t cluster)
{
	uint8_t data[KVL_COW_CLUSTER];
	uint64_t offset = cluster * KVL_COW_CLUSTER, size = cow->size - offset;
	struct iovec iov;
	int error;

	if (is_written(cow, cluster))
		return 0;
	if (size > KVL_COW_CLUSTER)
		size = KVL_COW_CLUSTER;
	iov = (struct iovec){.iov_base = data, .iov_len = size};
	error = kvl_file_read(cow->base_fd, &(struct kvl_iovecs){.iov = &iov, .count = 1}, offset, size);
	if (error)
		return error;
	iov = (struct iovec){.iov_base = data, .iov_len = size};
	return kvl_file_write(cow->top_fd, &(struct kvl_iovecs){.iov = &iov, .count = 1}, offset, size, 0);
}

/* Fill the clusters at both ends of a range of which it covers only a part. With the lock. */
static int fill_ends(struct kvl_cow *cow, uint64_t offset, uint64_t size)
{
	uint64_t end = offset + size, last = (end - 1) / KVL_COW_CLUSTER;
	int error = 0;

	if (offset % KVL_COW_CLUSTER)
		error = fill(cow, offset / KVL_COW_CLUSTER);
	if (!error && end % KVL_COW_CLUSTER && end != cow->size)
		error = fill(cow, last);
	return error;
}

int kvl_cow_read(struct kvl_cow *cow, struct kvl_iovecs *to, uint64_t offset, uint64_t size)
{
	uint64_t end = offset + size, last = (end + KVL_COW_CLUSTER - 1) / KVL_COW_CLUSTER;

	while (offset < end) {
		uint64_t cluster = offset / KVL_COW_CLUSTER;
		/* Looked at once: written meanwhile, it would take clusters written long ago along to the base. */
		bool state = is_written(cow, cluster);
		uint64_t next = run_end(cow, cluster, last, state) * KVL_COW_CLUSTER;
		int fd = state ? cow->top_fd : cow->base_fd, error;

		if (next > end)
			next = end;
		error = kvl_file_read(fd, to, offset, next - offset);
		if (error)
			return error;
		offset = next;
	}
	return 0;
}

int kvl_cow_write(struct kvl_cow *cow, struct kvl_iovecs *from, uint64_t offset, uint64_t size)
{
	uint64_t first = offset / KVL_COW_CLUSTER, end = (offset + size + KVL_COW_CLUSTER - 1) / KVL_COW_CLUSTER;
	int error;

	if (!size)
		return 0;
	if (is_written(cow, first) && run_end(cow, first, end, true) == end)
		return kvl_file_write(cow->top_fd, from, offset, size, 0);
	/* Another worker's fill must not put the base's data over ours. */
	pthread_mutex_lock(&cow->lock);
	error = fill_ends(cow, offset, size);
	if (!error)
		error = kvl_file_write(cow->top_fd, from, offset, size, 0);
	if (!error)
		mark_written(cow, first, end);
	pthread_mutex_unlock(&cow->lock);
	return error;
}

int kvl_cow_zero(struct kvl_cow *cow, uint64_t offset, uint64_t size)
{
	uint64_t first = offset / KVL_COW_CLUSTER, end = (offset + size + KVL_COW_CLUSTER - 1) / KVL_COW_CLUSTER;
	int error;

	if (!size)
		return 0;
	pthread_mutex_lock(&cow->lock);
	error = fill_ends(cow, offset, size);
	if (!error)
		error = kvl_file_zero(cow->top_fd, offset, size, true);
	if (!error)
		mark_written(cow, first, end);
	pthread_mutex_unlock(&cow->lock);
	return error;
}
