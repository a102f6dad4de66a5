#include "net.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/if_ether.h>
#include <string.h>
#include <sys/socket.h>

enum {
	LENGTH_SIZE = 4,
	/* How much to ask the peer for at a time, at least. */
	READ_MIN = KVL_NET_FRAME_MAX + LENGTH_SIZE,
	VISIT_BYTES = 512 << 10,
	/*
	 * How much may be sent together before the last frame. A stream socket keeps what one call has sent in pieces of 47
	 * KiB. A peer may read the first before the second is there, and passt (Debian 12's) then loses its place for good if
	 * the cut is in a length, or if a frame comes in three: so a length has to be in the first, and two have to do.
	 */
	BATCH_BYTES = 24 << 10,
	PAUSED = 2,
	/* An acknowledgement waits for more if the driver has sent less than this: it is short of no window then. */
	HELD_BYTES = 4096,
	/* Sizes of headers, those of IP and TCP without options. */
	ETHERNET = 14,
	IP = 20,
	TCP = 20,
	TCP_SYN = 2,
	TCP_ACK = 16,
};

/*
 * How long the driver is not told of acknowledgements that wait: many times what a program needs for its next request,
 * and less than what makes a TCP send again (two ticks of 1 ms at the least).
 */
static const uint64_t HELD_NS = 2000000;

static uint32_t load_length(const struct kvl_net *net)
{
	uint32_t length;

	memcpy(&length, &net->spill[net->begin], sizeof(length));
	return ntohl(length);
}

static uint32_t load_be16(const uint8_t *at)
{
	return (uint32_t)at[0] << 8 | at[1];
}

/*
 * Whether the driver need not be told of a frame by itself: a segment that acknowledges little, and does nothing else. A
 * peer like passt sends one for each small answer, right before the next request. The third segment of a handshake looks
 * the same, but a program may wait for it.
 */
static bool may_wait(struct kvl_net *net, const uint8_t *frame, uint32_t length)
{
	const uint8_t *ip = frame + ETHERNET, *tcp = ip + IP;

	if (length < ETHERNET + IP + TCP || load_be16(frame + 12) != ETH_P_IP || ip[0] != 0x45 || ip[9] != IPPROTO_TCP)
		return false;
	if ((tcp[13] & (TCP_SYN | TCP_ACK)) == TCP_SYN)
		net->handshakes++;
	if (tcp[13] != TCP_ACK || load_be16(ip + 2) != IP + 4u * (tcp[12] >> 4))
		return false;
	if (net->handshakes) {
		net->handshakes--;
		return false;
	}
	return net->sent_since < HELD_BYTES;
}

static int interrupt_now(void *context)
{
	struct kvl_net *net = context;

	net->is_urgent = false;
	net->sent_since = 0;
	kvl_net_interrupt(net, net->rx);
	return 0;
}

void kvl_net_stream_interrupt(struct kvl_net *net)
{
	if (net->is_urgent || net->is_gone) {
		kvl_worker_put_off(net->worker, NULL, NULL, 0);
		interrupt_now(net);
	} else if (net->rx->unsignalled && !net->worker->later) {
		kvl_worker_put_off(net->worker, interrupt_now, net, HELD_NS);
	}
}

/*
 * Give the driver what has arrived whole. Returns 1 if more is needed of the peer, 0 if the driver has no buffers,
 * PAUSED if a limiter wants it so, or KVL_NET_E_*.
 */
static int deliver_frames(struct kvl_net *net)
{
	while (net->end - net->begin >= LENGTH_SIZE) {
		uint32_t length = load_length(net);
		int code = 1;

		if (length == 0 || length > KVL_NET_FRAME_MAX) {
			net->error = (int)length;
			return KVL_NET_E_PEER;
		}
		if (net->end - net->begin < LENGTH_SIZE + length)
			return 1;
		if (!kvl_net_may_receive(net))
			return PAUSED;
		if (length < KVL_NET_FRAME_MIN || __atomic_load_n(&net->is_down, __ATOMIC_RELAXED)) {
			net->counters.rx_dropped++;
		} else {
			net->received = KVL_NET_HEADER + length;
			net->direct = KVL_NET_HEADER; /* made here, not received */
			code = kvl_net_deliver(net, &net->spill[net->begin + LENGTH_SIZE]);
			if (code == 1 && !may_wait(net, &net->spill[net->begin + LENGTH_SIZE], length))
				net->is_urgent = true;
		}
		if (code <= 0)
			return code;
		net->begin += LENGTH_SIZE + length;
	}
	return 1;
}

/* Read what the peer has sent; returns as recv, and in (is_all) whether there was no more. */
static ssize_t read_stream(struct kvl_net *net, bool *is_all)
{
	size_t room;
	ssize_t size;

	if (net->begin == net->end) {
		net->begin = net->end = 0;
	} else if (sizeof(net->spill) - net->end < READ_MIN) {
		memmove(net->spill, &net->spill[net->begin], net->end - net->begin);
		net->end -= net->begin;
		net->begin = 0;
	}
	room = sizeof(net->spill) - net->end;
	size = recv(net->fd, &net->spill[net->end], room, MSG_DONTWAIT);
	*is_all = size > 0 && (size_t)size < room;
	return size;
}

int kvl_net_stream_receive(struct kvl_net *net)
{
	uint64_t done = 0;
	bool is_all = false;

	for (;;) {
		int code = deliver_frames(net);
		ssize_t size;

		if (code == PAUSED)
			return 0;
		if (code < 0) {
			net->is_urgent = true;
			return code;
		}
		if (code == 0) {
			net->is_urgent = true; /* it adds buffers when it has seen these */
			kvl_net_wait_for_buffers(net);
			return 0;
		}
		/* Only here: frames that have arrived already are not announced again. */
		if (is_all || done >= VISIT_BYTES)
			return 0;
		size = read_stream(net, &is_all);
		if (size < 0 && (errno == EAGAIN || errno == EINTR))
			return 0;
		if (size < 0 && kvl_net_back_off(net, errno, net->rx_timer, net->readable_source))
			return 0;
		if (size <= 0) {
			net->error = size ? errno : 0;
			return KVL_NET_E_GONE;
		}
		net->end += (uint32_t)size;
		done += (uint64_t)size;
	}
}

/* Note that (size) bytes were written; returns whether that was all. */
static bool advance(struct kvl_net_sending *sending, uint64_t size)
{
	while (sending->iov_count && sending->iov[sending->first_iov].iov_len <= size) {
		size -= sending->iov[sending->first_iov++].iov_len;
		sending->iov_count--;
	}
	if (sending->iov_count && size) {
		struct iovec *iov = &sending->iov[sending->first_iov];

		iov->iov_base = (uint8_t *)iov->iov_base + size;
		iov->iov_len -= size;
	}
	return sending->iov_count == 0;
}

int kvl_net_stream_transmit(struct kvl_net *net)
{
	struct kvl_net_sending *sending = &net->sending;
	uint64_t end = net->counters.tx_bytes + VISIT_BYTES;

	while (net->counters.tx_bytes < end) {
		struct msghdr message = {0};
		ssize_t size;

		/* What was written in part stays as it is. */
		if (sending->first_iov == 0) {
			while (sending->size < BATCH_BYTES && kvl_net_take(net) > 0)
				;
		}
		if (!sending->count)
			return 0;
		message.msg_iov = &sending->iov[sending->first_iov];
		message.msg_iovlen = sending->iov_count;
		do
			size = sendmsg(net->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
		while (size < 0 && errno == EINTR);
		if (size < 0 && errno == EAGAIN) {
			kvl_net_wait_for_room(net);
			return 0;
		}
		/* The descriptor is as writable as before: waiting for that would be none. */
		if (size < 0 && kvl_net_back_off(net, errno, net->tx_timer, net->tx_source))
			return 0;
		if (size < 0) {
			net->error = errno;
			return KVL_NET_E_GONE;
		}
		if (advance(sending, (uint64_t)size))
			kvl_net_sent(net, false);
	}
	return 0;
}
