#include "net.h"

#include <endian.h>
#include <errno.h>
#include <linux/virtio_net.h>
#include <stddef.h>
#include <string.h>

enum {
	/* What one visit does at most, before the other direction has its turn. */
	VISIT_FRAMES = 64,
	VISIT_BYTES = 512 << 10,
};

void kvl_net_wait_for_buffers(struct kvl_net *net)
{
	kvl_worker_mask(net->worker, net->readable_source, true);
	kvl_worker_mask(net->worker, net->rx_source, false);
}

/* Room for the iovecs of another chain, behind those of the others. */
static struct iovec *pool_room(struct kvl_net_pool *pool, uint32_t chain_max)
{
	struct iovec *first = &pool->iov[pool->first_iov];

	/* One more for the spill. */
	if (pool->first_iov + pool->iov_count + chain_max + 1 > sizeof(pool->iov) / sizeof(pool->iov[0])) {
		memmove(pool->iov, first, pool->iov_count * sizeof(*first));
		pool->first_iov = 0;
	}
	return &pool->iov[pool->first_iov + pool->iov_count];
}

static bool pool_is_full(const struct kvl_net *net)
{
	const struct kvl_net_pool *pool = &net->pool;

	if (!net->is_mergeable)
		return pool->count > 0; /* a frame has one chain */
	return pool->count >= net->rx->size || pool->iov_count + net->rx->size >= KVL_NET_IOV_MAX;
}

/* Take receive chains until there is room for (size) bytes, or no more of them. */
static int gather(struct kvl_net *net, uint64_t size)
{
	struct kvl_net_pool *pool = &net->pool;

	while (pool->size < size && !pool_is_full(net)) {
		struct kvl_chain chain = {.iov = pool_room(pool, net->rx->size)};
		uint32_t place = (pool->first + pool->count) % KVL_NET_QUEUE_MAX;
		int code = kvl_virtq_pop(net->rx, &chain);

		if (code == 0)
			break;
		if (code < 0)
			return KVL_NET_E_RX_QUEUE;
		if (chain.readable_count || !chain.writable_count) {
			kvl_virtq_fail(net->rx, KVL_E_RX_BUFFER, chain.readable_size, 0);
			return KVL_NET_E_RX_QUEUE;
		}
		pool->heads[place] = chain.head;
		pool->iov_counts[place] = chain.writable_count;
		pool->sizes[place] = chain.writable_size;
		pool->iov_count += chain.writable_count;
		pool->size += chain.writable_size;
		pool->count++;
	}
	return 0;
}

/* Take the oldest chain out of the pool; returns how many of (left) bytes it holds. */
static uint32_t pool_shift(struct kvl_net *net, uint32_t place, uint32_t left)
{
	struct kvl_net_pool *pool = &net->pool;
	uint64_t size = pool->sizes[pool->first];
	uint32_t written = size < left ? (uint32_t)size : left;

	kvl_virtq_stage(net->rx, place, pool->heads[pool->first], written);
	pool->first_iov += pool->iov_counts[pool->first];
	pool->iov_count -= pool->iov_counts[pool->first];
	pool->size -= size;
	pool->first = (pool->first + 1) % KVL_NET_QUEUE_MAX;
	pool->count--;
	return written;
}

/* How many chains of the pool (size) bytes take. */
static uint16_t count_chains(const struct kvl_net_pool *pool, uint64_t size)
{
	uint64_t room = 0;
	uint16_t count = 0;

	while (room < size)
		room += pool->sizes[(pool->first + count++) % KVL_NET_QUEUE_MAX];
	return count;
}

/*
 * What the kernel does not write: num_buffers; and flags that this driver did not ask for are not shown to it. That it may
 * ask for them on a stream says that the peer's checksums need no check.
 */
static void complete_header(struct kvl_net *net, uint16_t num_buffers)
{
	const struct iovec *iov = &net->pool.iov[net->pool.first_iov];
	const struct virtio_net_hdr_v1 header = {.flags = net->has_flags ? VIRTIO_NET_HDR_F_DATA_VALID : 0};
	uint16_t value = htole16(num_buffers);

	if (net->is_stream)
		kvl_iov_write(iov, net->pool.iov_count, 0, &header, sizeof(header));
	else if (!net->has_flags)
		kvl_iov_write(iov, net->pool.iov_count, offsetof(struct virtio_net_hdr_v1, flags), &header.flags, 1);
	kvl_iov_write(iov, net->pool.iov_count, offsetof(struct virtio_net_hdr_v1, num_buffers), &value, sizeof(value));
}

int kvl_net_deliver(struct kvl_net *net, const uint8_t *rest)
{
	struct kvl_net_pool *pool = &net->pool;
	uint32_t left = net->received, place = 0;
	int code = gather(net, left);

	if (code)
		return code;
	if (pool->size < left) {
		if (!pool_is_full(net))
			return 0;
		net->received = 0;
		net->counters.rx_dropped++;
		return 1;
	}
	if (left > net->direct)
		kvl_iov_write(&pool->iov[pool->first_iov], pool->iov_count, net->direct, rest, left - net->direct);
	complete_header(net, count_chains(pool, left));
	while (left)
		left -= pool_shift(net, place++, left);
	/* All chains of a frame at once (5.1.6.4): the driver would not wait for the others. */
	kvl_virtq_publish(net->rx, place);
	if (net->rx_limiter)
		kvl_limiter_take(net->rx_limiter, net->received - KVL_NET_HEADER);
	net->counters.rx_packets++;
	net->counters.rx_bytes += net->received - KVL_NET_HEADER;
	net->received = 0;
	return 1;
}

bool kvl_net_may_receive(struct kvl_net *net)
{
	return !kvl_net_pause(net, net->rx_limiter, net->rx_timer, net->readable_source);
}

/* Read a frame into the pool's buffers, and what they do not hold into (spill). Returns as readv. */
static ssize_t read_frame(struct kvl_net *net)
{
	struct kvl_net_pool *pool = &net->pool;
	struct iovec *iov = &pool->iov[pool->first_iov];
	ssize_t size;

	iov[pool->iov_count] = (struct iovec){.iov_base = net->spill, .iov_len = KVL_NET_PACKET_MAX};
	net->direct = 0;
	if (kvl_net_is_down(net))
		return readv(net->fd, &iov[pool->iov_count], 1);
	size = readv(net->fd, iov, (int)pool->iov_count + 1);
	if (size > 0)
		net->direct = (uint64_t)size < pool->size ? (uint32_t)size : (uint32_t)pool->size;
	return size;
}

int kvl_net_tap_receive(struct kvl_net *net)
{
	uint64_t end = net->counters.rx_bytes + VISIT_BYTES;

	for (uint32_t i = 0; i < VISIT_FRAMES && net->counters.rx_bytes < end; i++) {
		int code = gather(net, net->rx_room);
		ssize_t size;

		if (code)
			return code;
		if (!net->received) {
			if (!net->pool.count) {
				kvl_net_wait_for_buffers(net);
				return 0;
			}
			if (!kvl_net_may_receive(net))
				return 0;
			size = read_frame(net);
			if (size < 0 && (errno == EAGAIN || errno == EINTR))
				return 0;
			if (size <= 0) {
				net->error = size ? errno : 0;
				return KVL_NET_E_GONE;
			}
			if (size < KVL_NET_HEADER + KVL_NET_FRAME_MIN || kvl_net_is_down(net)) {
				net->counters.rx_dropped++;
				continue;
			}
			net->received = (uint32_t)size;
		}
		code = kvl_net_deliver(net, net->spill);
		if (code < 0)
			return code;
		if (code == 0) {
			kvl_net_wait_for_buffers(net);
			return 0;
		}
		/* The driver can begin while we look for more; it asks for no other interrupt until it has caught up. */
		if (i == 0)
			kvl_net_interrupt(net, net->rx);
	}
	return 0;
}
