#include "net.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/virtio_net.h>
#include <poll.h>
#include <string.h>
#include <sys/uio.h>

#include "timer.h"

enum {
	/* What one visit does at most, before the other direction has its turn. */
	VISIT_FRAMES = 64,
	VISIT_BYTES = 512 << 10,
};

/* What a host without memory is given to find some. */
static const uint64_t BACK_OFF_NS = 5000000;

_Static_assert(sizeof(struct virtio_net_hdr_v1) == KVL_NET_HEADER, "header of VIRTIO 1.x");

bool kvl_net_is_down(const struct kvl_net *net)
{
	return net->is_gone || __atomic_load_n(&net->is_down, __ATOMIC_RELAXED);
}

bool kvl_net_is_gone(struct kvl_net *net, int error)
{
	switch (error) {
	case EBADF:
	case EBADFD: /* a TAP whose interface was removed */
	case EPIPE:
	case ECONNRESET:
	case ECONNREFUSED:
	case ENOTCONN:
	case ESHUTDOWN:
	case ENODEV:
		net->error = error;
		return true;
	default:
		return false;
	}
}

static void stop_receiving(struct kvl_net *net)
{
	kvl_worker_mask(net->worker, net->rx_source, true);
	kvl_worker_mask(net->worker, net->readable_source, true);
}

/* The descriptor is of no use any more: look at it no more, and drop what is sent. */
static void give_up(struct kvl_net *net)
{
	net->is_gone = true;
	stop_receiving(net);
	kvl_worker_mask(net->worker, net->writable_source, true);
	kvl_worker_mask(net->worker, net->tx_source, false);
	if (net->sending.count)
		kvl_net_sent(net, true);
}

bool kvl_net_pause(struct kvl_net *net, struct kvl_limiter *limiter, int timer_fd, uint32_t source)
{
	uint64_t wait_ns = limiter ? kvl_limiter_wait_ns(limiter, kvl_monotonic_ns()) : 0;

	if (!wait_ns || kvl_timer_arm(timer_fd, wait_ns))
		return false;
	kvl_worker_mask(net->worker, source, true);
	net->pauses++;
	return true;
}

bool kvl_net_back_off(struct kvl_net *net, int error, int timer_fd, uint32_t source)
{
	if ((error != ENOBUFS && error != ENOMEM) || kvl_timer_arm(timer_fd, BACK_OFF_NS))
		return false;
	kvl_worker_mask(net->worker, source, true);
	return true;
}

/* ---- receive ---- */

static void wait_for_frames(struct kvl_net *net)
{
	kvl_virtq_disable_notify(net->rx);
	kvl_worker_mask(net->worker, net->rx_source, true);
	kvl_worker_mask(net->worker, net->readable_source, false);
}

void kvl_net_interrupt(struct kvl_net *net, struct kvl_virtq *queue)
{
	if (kvl_virtq_needs_interrupt(queue))
		kvl_irq_raise(net->irq, KVL_IRQ_QUEUE);
}

/* After a visit: mask what would only fail again, and tell the driver what was used. Returns (code). */
static int end_visit(struct kvl_net *net, struct kvl_virtq *queue, int code)
{
	if (code == KVL_NET_E_GONE || code == KVL_NET_E_PEER)
		give_up(net);
	if (code == KVL_NET_E_RX_QUEUE)
		stop_receiving(net);
	if (queue)
		kvl_net_interrupt(net, queue);
	else
		kvl_net_stream_interrupt(net);
	return code;
}

static int receive(struct kvl_net *net)
{
	if (net->is_stream)
		return end_visit(net, NULL, kvl_net_stream_receive(net));
	return end_visit(net, net->rx, kvl_net_tap_receive(net));
}

static int on_readable(void *context)
{
	return receive(context);
}

static int on_rx_timer(void *context)
{
	struct kvl_net *net = context;

	kvl_timer_drain(net->rx_timer);
	if (net->is_gone || net->rx->fault)
		return 0;
	kvl_worker_mask(net->worker, net->readable_source, false);
	return receive(net);
}

static int on_buffers(void *context)
{
	struct kvl_net *net = context;

	wait_for_frames(net);
	return receive(net);
}

/* ---- transmit ---- */

void kvl_net_wait_for_room(struct kvl_net *net)
{
	kvl_worker_mask(net->worker, net->tx_source, true);
	kvl_worker_mask(net->worker, net->writable_source, false);
}

/* Skip (size) bytes at the front of iovecs; returns how many of them that uses up. */
static uint32_t skip(struct iovec *iov, uint32_t count, uint64_t size)
{
	uint32_t used = 0;

	while (used < count && iov[used].iov_len <= size)
		size -= iov[used++].iov_len;
	if (used < count && size) {
		iov[used].iov_base = (uint8_t *)iov[used].iov_base + size;
		iov[used].iov_len -= size;
	}
	return used;
}

/*
 * Copy the start of a frame and judge the copy. (iov) are the chain's buffers, with two free ones in front; returns
 * the first of those that shall be written, and their number in (count); or NULL if the frame must not be sent.
 */
static struct iovec *begin_frame(struct kvl_net *net, struct kvl_net_head *copy, struct iovec *iov, uint32_t *count,
				 uint64_t frame_size)
{
	uint64_t copied = 0, header_size = net->is_stream ? 0 : KVL_NET_HEADER;
	struct virtio_net_hdr header;
	uint32_t used;

	if (net->egress) {
		kvl_iov_read(iov, *count, 0, copy->header, KVL_NET_HEADER);
		copied = kvl_iov_read(iov, *count, KVL_NET_HEADER, copy->frame, sizeof(copy->frame));
		memcpy(&header, copy->header, sizeof(header));
		if (!kvl_egress_allows(net->egress, net->is_stream ? NULL : &header, copy->frame, copied))
			return NULL;
	} else if (!net->is_stream) {
		return iov;
	}
	used = skip(iov, *count, KVL_NET_HEADER + copied);
	iov += used;
	*count -= used;
	if (copied) {
		*--iov = (struct iovec){.iov_base = copy->frame - header_size, .iov_len = copied + header_size};
		(*count)++;
	}
	if (net->is_stream) {
		copy->length = htonl((uint32_t)frame_size);
		*--iov = (struct iovec){.iov_base = &copy->length, .iov_len = sizeof(copy->length)};
		(*count)++;
	}
	return iov;
}

int kvl_net_take(struct kvl_net *net)
{
	struct kvl_net_sending *sending = &net->sending;
	uint32_t end = sending->first_iov + sending->iov_count;

	if (sending->count == KVL_NET_BATCH || end + 2 + net->tx->size > KVL_NET_IOV_MAX)
		return 0;
	/* Frames that are not sent count, too, or a driver that offers them again and again would keep us here. */
	for (uint32_t i = 0; i < VISIT_FRAMES; i++) {
		struct kvl_chain chain = {.iov = &sending->iov[end + 2]};
		struct iovec *first = NULL;
		uint32_t count;
		int code;

		if (kvl_net_pause(net, net->tx_limiter, net->tx_timer, net->tx_source))
			return 0;
		code = kvl_virtq_pop(net->tx, &chain);
		if (code <= 0)
			return code;
		count = chain.readable_count;
		if (kvl_net_is_down(net) || chain.readable_size < KVL_NET_HEADER + KVL_NET_FRAME_MIN ||
		    chain.readable_size > KVL_NET_PACKET_MAX) {
			net->counters.tx_dropped++;
		} else {
			first = begin_frame(net, &sending->copies[sending->count], chain.iov, &count,
					    chain.readable_size - KVL_NET_HEADER);
			if (!first)
				net->counters.tx_refused++;
		}
		if (!first) {
			kvl_virtq_push(net->tx, chain.head, 0);
			continue;
		}
		memmove(&sending->iov[end], first, count * sizeof(*first));
		sending->heads[sending->count++] = chain.head;
		sending->iov_count += count;
		sending->size += chain.readable_size - KVL_NET_HEADER;
		if (net->tx_limiter)
			kvl_limiter_take(net->tx_limiter, chain.readable_size - KVL_NET_HEADER);
		return 1;
	}
	return 0;
}

void kvl_net_sent(struct kvl_net *net, bool is_dropped)
{
	struct kvl_net_sending *sending = &net->sending;

	for (uint32_t i = 0; i < sending->count; i++)
		kvl_virtq_stage(net->tx, i, sending->heads[i], 0);
	kvl_virtq_publish(net->tx, sending->count);
	if (is_dropped) {
		net->counters.tx_dropped += sending->count;
	} else {
		net->counters.tx_packets += sending->count;
		net->counters.tx_bytes += sending->size;
		net->sent_since += sending->size;
	}
	sending->count = sending->first_iov = sending->iov_count = 0;
	sending->size = 0;
}

static int transmit_tap(struct kvl_net *net)
{
	struct kvl_net_sending *sending = &net->sending;
	uint64_t end = net->counters.tx_bytes + VISIT_BYTES;

	for (uint32_t i = 0; i < VISIT_FRAMES && net->counters.tx_bytes < end; i++) {
		ssize_t size;

		if (!sending->count && kvl_net_take(net) <= 0)
			return 0; /* the worker sees a fault of the queue by itself */
		do
			size = writev(net->fd, sending->iov, (int)sending->iov_count);
		while (size < 0 && errno == EINTR);
		if (size < 0 && errno == EAGAIN) {
			kvl_net_wait_for_room(net);
			return 0;
		}
		if (size < 0 && kvl_net_is_gone(net, errno))
			return KVL_NET_E_GONE;
		kvl_net_sent(net, size < 0);
	}
	return 0;
}

static int transmit(struct kvl_net *net)
{
	bool is_stream = net->is_stream && !net->is_gone;

	return end_visit(net, net->tx, is_stream ? kvl_net_stream_transmit(net) : transmit_tap(net));
}

static int on_chains(void *context)
{
	return transmit(context);
}

static int on_writable(void *context)
{
	struct kvl_net *net = context;

	kvl_worker_mask(net->worker, net->writable_source, true);
	kvl_worker_mask(net->worker, net->tx_source, false);
	return transmit(net);
}

static int on_tx_timer(void *context)
{
	struct kvl_net *net = context;

	kvl_timer_drain(net->tx_timer);
	return on_writable(net);
}

/* ---- the pair ---- */

int kvl_net_start(struct kvl_net *net, int rx_kick, int tx_kick)
{
	struct kvl_worker *worker = net->worker;
	int rx = kvl_worker_add_queue(worker, net->rx, rx_kick, on_buffers, net);
	int tx = kvl_worker_add_queue(worker, net->tx, tx_kick, on_chains, net);
	int readable = kvl_worker_add_fd(worker, net->fd, POLLIN, on_readable, net);
	int writable = kvl_worker_add_fd(worker, net->fd, POLLOUT, on_writable, net);

	if (net->rx_timer >= 0 && kvl_worker_add_fd(worker, net->rx_timer, POLLIN, on_rx_timer, net) < 0)
		return -1;
	if (net->tx_timer >= 0 && kvl_worker_add_fd(worker, net->tx_timer, POLLIN, on_tx_timer, net) < 0)
		return -1;
	if (writable < 0)
		return -1;
	net->rx_source = (uint32_t)rx;
	net->tx_source = (uint32_t)tx;
	net->readable_source = (uint32_t)readable;
	net->writable_source = (uint32_t)writable;
	kvl_net_wait_for_buffers(net);
	kvl_worker_mask(worker, net->writable_source, true);
	return 0;
}

void kvl_net_set_link(struct kvl_net *net, bool is_up)
{
	__atomic_store_n(&net->is_down, !is_up, __ATOMIC_RELAXED);
}
