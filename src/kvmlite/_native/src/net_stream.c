#include "net.h"

#include <arpa/inet.h>
#include <errno.h>
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
};

static uint32_t load_length(const struct kvl_net *net)
{
	uint32_t length;

	memcpy(&length, &net->spill[net->begin], sizeof(length));
	return ntohl(length);
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
		}
		if (code <= 0)
			return code;
		net->begin += LENGTH_SIZE + length;
	}
	return 1;
}

/* Read what the peer has sent; returns as recv. */
static ssize_t read_stream(struct kvl_net *net)
{
	if (net->begin == net->end) {
		net->begin = net->end = 0;
	} else if (sizeof(net->spill) - net->end < READ_MIN) {
		memmove(net->spill, &net->spill[net->begin], net->end - net->begin);
		net->end -= net->begin;
		net->begin = 0;
	}
	return recv(net->fd, &net->spill[net->end], sizeof(net->spill) - net->end, MSG_DONTWAIT);
}

int kvl_net_stream_receive(struct kvl_net *net)
{
	uint64_t done = 0;

	for (;;) {
		int code = deliver_frames(net);
		ssize_t size;

		if (code == PAUSED)
			return 0;
		if (code < 0)
			return code;
		if (code == 0) {
			kvl_net_wait_for_buffers(net);
			return 0;
		}
		/* Only here: frames that have arrived already are not announced again. */
		if (done >= VISIT_BYTES)
			return 0;
		size = read_stream(net);
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
