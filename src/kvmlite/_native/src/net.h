/*
 * One queue pair of a virtio-net device (VIRTIO 1.2, 5.1): frames between the driver's rings and a descriptor of the
 * host's, on the thread of a worker.
 *
 * The descriptor is a TAP's, where every read and write is one frame behind its virtio_net_hdr_v1, straight from and to
 * guest memory; or a stream's, where every frame comes behind its length in 32 big-endian bits and without a
 * header (net_stream.c): QEMU calls that a stream netdev, and passt's --fd speaks it.
 *
 * At any time a pair waits for frames of the host's or for receive buffers of the driver's, never for both, and for
 * chains to send or for the descriptor to take one: what is not waited for is masked, so nothing is looked at in vain.
 */
#ifndef KVL_NET_H
#define KVL_NET_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "bucket.h"
#include "egress.h"
#include "irq.h"
#include "virtq.h"
#include "worker.h"

enum {
	KVL_NET_HEADER = 12,        /* struct virtio_net_hdr_v1 */
	KVL_NET_PACKET_MAX = 65600, /* header, Ethernet header with a tag, 64 KiB of IP, and a little */
	KVL_NET_FRAME_MIN = 14,
	KVL_NET_FRAME_MAX = KVL_NET_PACKET_MAX - KVL_NET_HEADER,
	KVL_NET_QUEUE_MAX = 512, /* descriptors: any chain fits into one readv, with room for another */
	KVL_NET_IOV_MAX = 1024,  /* UIO_MAXIOV */
	KVL_NET_BATCH = 64,      /* frames that are sent together on a stream */
	KVL_NET_SPILL = 4 * 65536,
	/* What kvl_worker_run returns for a pair, once; it may go on: what is broken is not looked at again. */
	KVL_NET_E_RX_QUEUE = -1000, /* the driver broke the receive queue: see its fault */
	KVL_NET_E_GONE = -1001,     /* the descriptor's other end is gone: see (error), 0 for the end of a stream */
	KVL_NET_E_PEER = -1002,     /* the stream's peer sent a length that no frame has: see (error) */
};

/* Chains of the receive queue that wait for a frame, oldest first. */
struct kvl_net_pool {
	uint32_t first; /* the oldest, in the three arrays */
	uint32_t count;
	uint32_t first_iov;
	uint32_t iov_count;
	uint64_t size; /* bytes, of all */
	uint16_t heads[KVL_NET_QUEUE_MAX];
	uint16_t iov_counts[KVL_NET_QUEUE_MAX];
	uint64_t sizes[KVL_NET_QUEUE_MAX];
	struct iovec iov[2 * KVL_NET_IOV_MAX];
};

/* The start of a frame that is sent, where no guest can write. */
struct kvl_net_head {
	uint32_t length; /* big-endian; on a stream only */
	uint8_t header[KVL_NET_HEADER];
	uint8_t frame[KVL_EGRESS_HEAD];
};

/* Chains of the transmit queue that were taken, and what of them is not written yet. */
struct kvl_net_sending {
	uint32_t count; /* chains */
	uint32_t first_iov;
	uint32_t iov_count;
	uint64_t size; /* bytes, of all frames */
	uint16_t heads[KVL_NET_BATCH];
	struct kvl_net_head copies[KVL_NET_BATCH];
	struct iovec iov[KVL_NET_IOV_MAX];
};

struct kvl_net_counters {
	uint64_t rx_packets, rx_bytes; /* given to the driver, without headers */
	uint64_t rx_dropped;           /* link down, or larger than what the driver can take */
	uint64_t tx_packets, tx_bytes;
	uint64_t tx_dropped; /* link down, malformed, or not to the host's liking */
	uint64_t tx_refused; /* not allowed by the egress rules */
};

struct kvl_net {
	/* Set up by Python. */
	struct kvl_virtq *rx, *tx;
	struct kvl_irq *irq;
	struct kvl_worker *worker;
	const struct kvl_egress *egress; /* or NULL: anything goes out */
	struct kvl_limiter *rx_limiter, *tx_limiter; /* or NULL */
	int rx_timer, tx_timer;                      /* timerfds, for a limiter and for a stream; else -1 */
	int fd;                          /* nonblocking */
	bool is_stream;
	bool is_mergeable; /* VIRTIO_NET_F_MRG_RXBUF was negotiated */
	bool has_flags;    /* VIRTIO_NET_F_GUEST_CSUM was negotiated: the driver reads the flags of a header */
	uint32_t rx_room;  /* bytes to have ready for a frame, header included; a larger one costs a copy */
	bool is_down;      /* atomic */

	/* The worker's. */
	bool is_gone;
	int error;
	uint32_t rx_source, tx_source, readable_source, writable_source;
	uint64_t pauses; /* because of a limiter */
	struct kvl_net_counters counters;
	uint32_t received; /* bytes of a frame that waits for buffers, header included; 0 if there is none */
	uint32_t direct;   /* how many of them are in the pool's buffers; the others are in (spill) */
	uint32_t begin;    /* of what a stream has brought and the driver has not, in (spill) */
	uint32_t end;
	/* When the driver is told of a stream's frames, see net_stream.c. */
	bool is_urgent;      /* something that was received since it was told must not wait */
	uint32_t handshakes; /* connections to it that were begun and wait for their third segment */
	uint64_t sent_since; /* bytes it has sent since it was told */
	struct kvl_net_pool pool;
	struct kvl_net_sending sending;
	uint8_t spill[KVL_NET_SPILL];
};

/*
 * Begin with both queues set up, of at most KVL_NET_QUEUE_MAX descriptors, and add the pair to its worker, which does
 * not run. (rx_kick), (tx_kick): their kick eventfds. Returns 0, or -1 if the worker has no room.
 */
int kvl_net_start(struct kvl_net *net, int rx_kick, int tx_kick);

/* Whether frames pass; they are dropped while the link is down. Any thread. */
void kvl_net_set_link(struct kvl_net *net, bool is_up);

/* ---- between net.c (the pair, and sending), net_receive.c and net_stream.c ---- */

/* Whether frames are dropped. */
bool kvl_net_is_down(const struct kvl_net *net);

/* Leave a source alone until (limiter), if there is one, allows it again; returns whether it does not now. */
bool kvl_net_pause(struct kvl_net *net, struct kvl_limiter *limiter, int timer_fd, uint32_t source);

/*
 * After an (error) of the host's that is for lack of memory, which passes and of which no descriptor tells: leave the
 * source alone for a moment; returns whether it was that.
 */
bool kvl_net_back_off(struct kvl_net *net, int error, int timer_fd, uint32_t source);

/* Tell the driver of what was received from a stream: at once, or a little later if that can wait. */
void kvl_net_stream_interrupt(struct kvl_net *net);

/* Tell the driver what was used, if it wants to know. */
void kvl_net_interrupt(struct kvl_net *net, struct kvl_virtq *queue);

/*
 * Give the driver the frame of (received) bytes, of which those after (direct) are at (rest). Returns 1 if that is
 * done, or it had to be dropped; 0 if it waits for buffers; or KVL_NET_E_*.
 */
int kvl_net_deliver(struct kvl_net *net, const uint8_t *rest);

/*
 * Take the next chain to send and append what shall be written of it to (sending); without its header on a stream.
 * Returns 1; 0 if there is none, no room for it, or it was not found within a visit's worth of frames that must not be
 * sent, which are given back; or a fault of the queue.
 */
int kvl_net_take(struct kvl_net *net);

/* Forget the chains in (sending): they were written, or dropped. */
void kvl_net_sent(struct kvl_net *net, bool is_dropped);

/* Whether a frame may be received now; else the host's descriptor is left alone until it may. */
bool kvl_net_may_receive(struct kvl_net *net);

/* Turn to the other side; see the top. */
void kvl_net_wait_for_buffers(struct kvl_net *net);
void kvl_net_wait_for_room(struct kvl_net *net);

/* Whether an error of the descriptor is for good; kept in (error). */
bool kvl_net_is_gone(struct kvl_net *net, int error);

/* Receive from a TAP, until there is nothing more or something to wait for. Returns 0 or KVL_NET_E_*. */
int kvl_net_tap_receive(struct kvl_net *net);

/* Frames of a stream, likewise. */
int kvl_net_stream_receive(struct kvl_net *net);
int kvl_net_stream_transmit(struct kvl_net *net);

#endif
