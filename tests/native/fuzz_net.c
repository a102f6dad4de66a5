/*
 * Fuzzes a network card's queue pair with the chains of a hostile driver, plugged into a host that does as it likes.
 *
 * Inputs, see rings.h: where the queues are (both are in the same rings), 4 bytes of what the card is like, up to 48
 * steps, then guest RAM. A step is a visit of the worker's, and what driver and host do meanwhile. The system calls that
 * move frames are replaced by ours: a byte outside guest RAM aborts, and so does a frame that was not judged as it is
 * sent, or a stream whose lengths do not add up.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "net.h"
#include "rings.h"
#include "timer.h"

enum {
	OPTIONS = 4,
	STEPS = 48,
	NET_FD = 1000,
	OPTION_STREAM = 1,
	OPTION_MERGEABLE = 2,
	OPTION_FLAGS = 4,
	OPTION_EGRESS = 8,
	OPTION_FAILS = 16, /* the host, now and then */
	OPTION_DIRECTIONS = 32 | 64, /* receive, transmit, or both */
	OPTION_DOWN = 128,
	RX = 32,
	TX = 64,
};

/* Port 53 of anybody, and nothing else. */
static const struct kvl_egress egress = {.rule_count = 1, .rules = {{.family = 4, .protocol = 17, .port = 53}}};

static struct kvl_net *net;
static uint64_t host_state, received, sent, refused, dropped, held;
static int irq_fd = -1, timer_fd, fails;
static uint8_t tail[4 + KVL_EGRESS_HEAD + 16]; /* the start of a frame that comes out of a stream, length included */
static uint64_t tail_size, frame_left;

static uint32_t host_draw(uint32_t below)
{
	host_state = host_state * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(host_state >> 33) % below;
}

static int lacks_memory; /* the last call failed for that reason */

static int host_fails(void)
{
	static const int errors[] = {EAGAIN, EINTR, EIO, EINVAL, ENOMEM, ENOBUFS, EBADFD, EPIPE};

	lacks_memory = 0;

	if (host_draw(4) == 0)
		errno = EAGAIN;
	else if (fails && host_draw(12) == 0)
		errno = errors[host_draw(sizeof(errors) / sizeof(errors[0]))];
	else
		return 0;
	lacks_memory = errno == ENOMEM || errno == ENOBUFS;
	return 1;
}

static int is_ours(const void *base, uint64_t size)
{
	uintptr_t start = (uintptr_t)net, at = (uintptr_t)base;

	return at >= start && at - start < sizeof(*net) && size <= sizeof(*net) - (at - start);
}

/* What a guest that is quick does between the judgement and the call. */
static void scribble(void)
{
	for (unsigned i = 0; i < 4; i++)
		mem.regions[host_draw(2)].hva[DESC_GPA + host_draw(HIGH_SIZE - DESC_GPA)] = (uint8_t)host_draw(256);
}

static uint64_t frame_size(void)
{
	switch (host_draw(24)) {
	case 0:
		return KVL_NET_PACKET_MAX - host_draw(80);
	case 1:
		return 1 + host_draw(40);
	case 2:
		return 1 + host_draw(KVL_NET_PACKET_MAX);
	case 3:
		return KVL_NET_HEADER + KVL_NET_FRAME_MIN - host_draw(4);
	default:
		return 26 + host_draw(2000);
	}
}

ssize_t readv(int fd, const struct iovec *iov, int count)
{
	uint64_t size = frame_size(), left = size;

	require(fd == NET_FD && count > 0 && count <= KVL_NET_IOV_MAX, "a bad call of readv");
	for (int i = 0; i < count; i++)
		require(is_guest_ram(iov[i].iov_base, iov[i].iov_len) ||
				(i == count - 1 && is_ours(iov[i].iov_base, iov[i].iov_len)),
			"a receive buffer outside guest RAM");
	if (host_fails())
		return -1;
	for (int i = 0; i < count && left; i++) {
		uint64_t length = iov[i].iov_len < left ? iov[i].iov_len : left;

		/* The ends tell; the whole would take most of the time. */
		((uint8_t *)iov[i].iov_base)[0] = ((uint8_t *)iov[i].iov_base)[length - 1] = 0x55;
		left -= length;
	}
	scribble();
	return (ssize_t)(size - left);
}

/* A segment without data, as passt sends them, nearly: an acknowledgement most of the time. Returns its size. */
static uint32_t draw_segment(uint8_t *at)
{
	static const uint8_t flags[] = {0x10, 0x10, 0x10, 0x02, 0x12, 0x11, 0x18, 0x04};
	static const uint8_t headers[] = {[12] = 0x08, 0, 0x45, 0, 0, 40, [14 + 9] = 6, [14 + 20 + 12] = 0x50};
	uint32_t size = 54 + (host_draw(3) ? 0 : host_draw(16));

	memcpy(at, headers, sizeof(headers));
	memset(at + sizeof(headers), 0, 70 - sizeof(headers));
	at[14 + 20 + 13] = flags[host_draw(sizeof(flags))];
	if (host_draw(4) == 0)
		at[host_draw(54)] = (uint8_t)host_draw(256);
	return size;
}

ssize_t recv(int fd, void *to, size_t size, int flags)
{
	static uint8_t pending[4 + KVL_NET_PACKET_MAX];
	static uint32_t begin, end;
	size_t chunk;

	require(fd == NET_FD && flags == MSG_DONTWAIT && size > 0 && is_ours(to, size), "a bad call of recv");
	if (host_fails())
		return errno == EPIPE ? 0 : -1;
	if (begin == end) {
		uint32_t length = (uint32_t)frame_size(), wire;

		if (fails && host_draw(30) == 0)
			length = host_draw(2) ? 0 : UINT32_MAX - host_draw(9);
		else if (host_draw(2))
			length = draw_segment(pending + 4);
		wire = htonl(length);
		memcpy(pending, &wire, sizeof(wire));
		begin = 0;
		end = 4 + (length < KVL_NET_PACKET_MAX ? length : 100);
	}
	chunk = end - begin;
	if (host_draw(3) == 0)
		chunk = 1 + host_draw((uint32_t)chunk);
	if (chunk > size)
		chunk = size;
	memcpy(to, pending + begin, chunk);
	begin += (uint32_t)chunk;
	return (ssize_t)chunk;
}

static void check_judged(const uint8_t *frame, uint64_t size, const struct virtio_net_hdr *header)
{
	if (net->egress)
		require(kvl_egress_allows(&egress, header, frame, size < KVL_EGRESS_HEAD ? size : KVL_EGRESS_HEAD),
			"a frame was sent that is not allowed");
}

static uint64_t check_sent_iov(const struct iovec *iov, uint64_t count)
{
	uint64_t size = 0;

	require(count > 0 && count <= KVL_NET_IOV_MAX, "a bad number of iovecs");
	for (uint64_t i = 0; i < count; i++) {
		require(is_guest_ram(iov[i].iov_base, iov[i].iov_len) || is_ours(iov[i].iov_base, iov[i].iov_len),
			"a buffer to send outside guest RAM");
		size += iov[i].iov_len;
	}
	return size;
}

ssize_t writev(int fd, const struct iovec *iov, int count)
{
	uint8_t start[KVL_NET_HEADER + KVL_EGRESS_HEAD] __attribute__((aligned(8)));
	uint64_t size;

	if (fd != NET_FD) /* the C++ library's own */
		return syscall(SYS_writev, fd, iov, count);
	size = check_sent_iov(iov, (uint64_t)count);
	require(size >= KVL_NET_HEADER + KVL_NET_FRAME_MIN && size <= KVL_NET_PACKET_MAX, "a bad frame");
	scribble();
	kvl_iov_read(iov, (uint32_t)count, 0, start, sizeof(start));
	check_judged(start + KVL_NET_HEADER, size - KVL_NET_HEADER, (const void *)start);
	if (host_fails())
		return -1;
	sent++;
	return (ssize_t)size;
}

/* Follow the stream: lengths, and that each frame is what was judged. Returns how many bytes that took. */
static uint64_t follow(const uint8_t *bytes, uint64_t size)
{
	uint64_t wanted = tail_size < 4 ? 4 - tail_size : frame_left, kept;

	if (size > wanted)
		size = wanted;
	kept = tail_size < sizeof(tail) ? sizeof(tail) - tail_size : 0;
	if (kept)
		memcpy(tail + tail_size, bytes, size < kept ? size : kept);
	if (tail_size >= 4)
		frame_left -= size;
	tail_size += size;
	if (tail_size == 4) {
		uint32_t length;

		memcpy(&length, tail, sizeof(length));
		frame_left = ntohl(length);
		require(frame_left >= KVL_NET_FRAME_MIN && frame_left <= KVL_NET_FRAME_MAX, "a bad length in the stream");
	} else if (tail_size > 4 && !frame_left) {
		check_judged(tail + 4, tail_size - 4, NULL);
		tail_size = 0;
		sent++;
	}
	return size;
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags)
{
	uint64_t size = check_sent_iov(message->msg_iov, message->msg_iovlen), left;

	require(fd == NET_FD && flags == (MSG_DONTWAIT | MSG_NOSIGNAL), "a bad call of sendmsg");
	scribble();
	/* Whole frames but for the rest of one, and all but the last in a piece that a stream socket keeps together. */
	require(tail_size || size <= 24576 + 4 * KVL_NET_BATCH + KVL_NET_FRAME_MAX,
		"too much was sent together");
	if (host_fails())
		return -1;
	if (host_draw(2))
		size = 1 + host_draw((uint32_t)size);
	left = size;
	for (uint64_t i = 0; i < message->msg_iovlen && left; i++) {
		uint64_t length = message->msg_iov[i].iov_len < left ? message->msg_iov[i].iov_len : left;

		for (uint64_t at = 0; at < length;)
			at += follow((uint8_t *)message->msg_iov[i].iov_base + at, length - at);
		left -= length;
	}
	return (ssize_t)size;
}

static int visit(struct kvl_worker *worker, uint32_t number)
{
	struct kvl_source *source = &worker->sources[number];

	if (source->is_masked || (source->queue && !kvl_virtq_has_chain(source->queue)))
		return 0;
	return source->handle(source->context);
}

/* A stream whose host lacks memory waits for a timer: nothing else would tell of any, and all else is ready. */
static void check_backs_off(const struct kvl_worker *worker, int is_rx)
{
	uint32_t source = is_rx ? net->readable_source : net->tx_source;
	struct pollfd expired = {.fd = timer_fd, .events = POLLIN};
	struct itimerspec timer;

	require(worker->sources[source].is_masked && (is_rx || worker->sources[net->writable_source].is_masked),
		"looks again at once for memory of the host's");
	require(timerfd_gettime(timer_fd, &timer) == 0, "no timer");
	require(timer.it_value.tv_sec == 0, "waits for too long");
	require(timer.it_value.tv_nsec || poll(&expired, 1, 0) == 1, "waits for nothing"); /* it may have expired by now */
}

static void check_pair(const struct kvl_virtq *rx, const struct kvl_virtq *tx)
{
	require(rx->fault || (uint16_t)(rx->last_avail_idx - rx->used_idx) == net->pool.count, "a receive chain was lost");
	require((uint16_t)(tx->last_avail_idx - tx->used_idx) == net->sending.count, "a chain to send was lost");
	require(net->pool.count <= rx->size && net->sending.count <= KVL_NET_BATCH, "too many chains in flight");
}

/* One life of the pair. */
static void live(const struct kvl_virtq_layout *layout, const uint8_t *options, const uint8_t *steps, size_t count)
{
	static struct kvl_worker worker;
	struct kvl_limiter limiters[2];
	struct kvl_virtq rx, tx;
	struct kvl_irq irq;
	int directions = options[0] & OPTION_DIRECTIONS;

	if (irq_fd < 0) {
		irq_fd = eventfd(0, EFD_NONBLOCK);
		timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
		net = malloc(sizeof(*net));
		require(net != NULL, "no memory");
	}
	/* Not the large arrays: nobody may rely on what is in them. */
	memset(net, 0, offsetof(struct kvl_net, pool));
	memset(&net->pool, 0, offsetof(struct kvl_net_pool, heads));
	memset(&net->sending, 0, offsetof(struct kvl_net_sending, heads));
	host_state = 1 + ((uint64_t)options[2] << 8 | options[3]);
	fails = options[0] & OPTION_FAILS;
	tail_size = frame_left = 0;
	kvl_irq_init(&irq, irq_fd);
	kvl_worker_init(&worker, -1, 0);
	if (kvl_virtq_init(&rx, &mem, layout) || kvl_virtq_init(&tx, &mem, layout))
		return;
	net->rx = &rx;
	net->tx = &tx;
	net->irq = &irq;
	net->worker = &worker;
	net->fd = NET_FD;
	net->is_stream = options[0] & OPTION_STREAM;
	net->is_mergeable = options[0] & OPTION_MERGEABLE;
	net->has_flags = options[0] & OPTION_FLAGS;
	net->egress = options[0] & OPTION_EGRESS ? &egress : NULL;
	net->rx_room = options[1] & 1 ? 65562 : 1530;
	for (unsigned i = 0; i < 2; i++) {
		kvl_limiter_init(&limiters[i]);
		kvl_bucket_init(&limiters[i].bytes, 1 << 30, 1 << 16, kvl_monotonic_ns());
		kvl_bucket_init(&limiters[i].operations, 0, 1, 0);
	}
	net->rx_limiter = options[1] & 2 ? &limiters[0] : NULL;
	net->tx_limiter = options[1] & 4 ? &limiters[1] : NULL;
	net->rx_timer = net->is_stream || net->rx_limiter ? timer_fd : -1;
	net->tx_timer = net->is_stream || net->tx_limiter ? timer_fd : -1;
	kvl_net_set_link(net, !(options[0] & OPTION_DOWN));
	require(kvl_net_start(net, -1, -1) == 0, "no room in the worker");
	for (size_t i = 0; i < count; i++) {
		for (uint32_t source = 0; source < worker.count; source++) {
			int is_rx_timer = net->rx_timer >= 0 && source == 4;
			int is_rx = source == net->rx_source || source == net->readable_source || is_rx_timer, code;

			if (directions && !(directions & (is_rx ? RX : TX)))
				continue;
			lacks_memory = 0;
			code = visit(&worker, source);
			require(code == 0 || code == KVL_NET_E_RX_QUEUE || code == KVL_NET_E_GONE || code == KVL_NET_E_PEER,
				"an unexpected code");
			require(code != KVL_NET_E_GONE || fails, "a host that does not fail is gone");
			require(code != KVL_NET_E_RX_QUEUE || rx.fault, "a fault without a fault");
			check_pair(&rx, &tx);
			if (net->is_stream && !net->is_gone && lacks_memory)
				check_backs_off(&worker, is_rx);
			require(!rx.unsignalled || worker.later, "the driver is not told of what it got");
		}
		if (worker.later && host_draw(3) == 0) {
			kvl_handler *later = worker.later;

			worker.later = NULL;
			held++;
			later(worker.later_context);
			require(!rx.unsignalled, "the driver is not told in the end");
		}
		if (steps[i] & 16)
			rings_advance(steps[i] % 4);
		if (steps[i] & 32)
			kvl_net_set_link(net, steps[i] & 64);
	}
	received += net->counters.rx_packets;
	dropped += net->counters.rx_dropped + net->counters.tx_dropped;
	refused += net->counters.tx_refused;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct rings_input input;

	if (rings_take_input(data, size, OPTIONS, STEPS, &input))
		live(&input.layout, input.options, input.steps, input.count);
	return 0;
}

#ifndef KVL_LIBFUZZER

/* A frame that the egress rules let pass, most of the time, where descriptors point. */
static void draw_frame(uint8_t *at)
{
	static const uint8_t udp[] = {0,    0,	  0,	0,    0,    0,	  2,	0,    0,    0,	  0,	1,    0x08, 0,
				      0x45, 0,	  0,	40,   0,    0,	  0,	0,    64,   17,	  0,	0,    10,   0,
				      0,    1,	  10,	0,    0,    2,	  0x30, 0x39, 0,    53,	  0,	20,   0,    0};

	memset(at, 0, KVL_NET_HEADER);
	memcpy(at + KVL_NET_HEADER, udp, sizeof(udp));
	if (draw(4) == 0)
		at[draw(KVL_NET_HEADER + sizeof(udp))] = (uint8_t)draw(256);
}

/* Chains of a driver that is nearly right: buffers to fill, or frames to send in one or two parts. */
static void draw_chains(struct kvl_virtq_layout *layout, int is_rx)
{
	uint8_t *ram = mem.regions[0].hva, *avail = ram + AVAIL_GPA;

	layout->desc_gpa = DESC_GPA;
	layout->avail_gpa = AVAIL_GPA;
	layout->used_gpa = USED_GPA;
	layout->size = 64;
	for (unsigned i = 0; i < 16; i++)
		draw_frame(ram + BUFFERS_GPA + 128 * i);
	for (uint32_t i = 0; i < 64; i += 2) {
		uint8_t *at = ram + DESC_GPA + 16 * i;
		uint32_t split = 1 + draw(20), size = is_rx ? 1 + draw(1600) : 26 + draw(1500);
		uint64_t gpa = is_rx ? draw_gpa() : (uint64_t)BUFFERS_GPA + 128 * draw(16);
		uint32_t is_split = draw(2);

		if (draw(20) == 0)
			size = 1 + draw(0x7000);
		put(at, gpa, 8);
		put(at + 8, is_split ? split : size, 4);
		put(at + 12, (is_rx ? 2u : 0u) | is_split, 2);
		put(at + 14, i + 1, 2);
		put(at + 16, gpa + split, 8);
		put(at + 24, size, 4);
		put(at + 28, is_rx ? 2 : 0, 2);
		put(at + 30, 0, 2);
	}
	for (uint32_t i = 0; i < 64; i++)
		put(avail + 4 + 2 * i, 2 * (i % 32), 2);
	put(avail + 2, draw(33), 2);
	if (draw(3) == 0)
		ram[DESC_GPA + draw(AVAIL_GPA + 64 - DESC_GPA)] = (uint8_t)draw(256);
}

int main(int argc, char **argv)
{
	struct rings_run run;

	rings_run_begin(&run, argc, argv);
	while (rings_run_next(&run, received < sent ? received : sent)) {
		struct kvl_virtq_layout layout = rings_draw();
		uint8_t steps[STEPS], options[OPTIONS];

		for (unsigned option = 0; option < OPTIONS; option++)
			options[option] = (uint8_t)draw(256);
		if (draw(4) == 0)
			options[0] |= OPTION_DOWN;
		else
			options[0] &= (uint8_t)~OPTION_DOWN;
		if (draw(4)) {
			int is_rx = (int)draw(2);

			draw_chains(&layout, is_rx);
			options[0] = (uint8_t)((options[0] & ~OPTION_DIRECTIONS) | (is_rx ? RX : TX));
		}
		for (unsigned step = 0; step < STEPS; step++)
			steps[step] = (uint8_t)draw(256) & (draw(8) ? 0x1f : 0xff);
		live(&layout, options, steps, STEPS);
	}
	rings_run_end(&run);
	printf("%llu %llu %llu %llu %llu\n", (unsigned long long)received, (unsigned long long)sent,
	       (unsigned long long)refused, (unsigned long long)dropped, (unsigned long long)held);
	return 0;
}
#endif
