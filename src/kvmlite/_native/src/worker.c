#define _GNU_SOURCE /* ppoll */
#include "worker.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "timer.h"

/* How long queues are visited in a row before other descriptors are looked at, which costs a system call. */
static const uint64_t BUSY_NS = 20000;

void kvl_worker_init(struct kvl_worker *worker, int stop_fd, uint64_t spin_max_ns)
{
	memset(worker, 0, sizeof(*worker));
	worker->fds[KVL_WORKER_MAX_SOURCES] = (struct pollfd){.fd = stop_fd, .events = POLLIN};
	worker->spin_max_ns = spin_max_ns;
}

void kvl_worker_watch(struct kvl_worker *worker, uint32_t source, kvl_has_work *function)
{
	worker->sources[source].has_work = function;
}

void kvl_worker_clear(struct kvl_worker *worker)
{
	worker->count = 0;
	worker->later = NULL;
}

static int add_source(struct kvl_worker *worker, const struct kvl_source *source, short events)
{
	uint32_t number = worker->count;

	if (number == KVL_WORKER_MAX_SOURCES)
		return -1;
	worker->sources[number] = *source;
	worker->fds[number] = (struct pollfd){.fd = source->fd, .events = events};
	worker->count++;
	return (int)number;
}

int kvl_worker_add_queue(struct kvl_worker *worker, struct kvl_virtq *queue, int kick_fd, kvl_handler *handle,
			 void *context)
{
	struct kvl_source source = {.handle = handle, .context = context, .queue = queue, .fd = kick_fd};

	return add_source(worker, &source, POLLIN);
}

int kvl_worker_add_fd(struct kvl_worker *worker, int fd, short events, kvl_handler *handle, void *context)
{
	struct kvl_source source = {.handle = handle, .context = context, .fd = fd};

	return add_source(worker, &source, events);
}

void kvl_worker_mask(struct kvl_worker *worker, uint32_t number, bool is_masked)
{
	struct kvl_source *source = &worker->sources[number];

	source->is_masked = is_masked;
	/* poll(2) ignores negative descriptors. */
	worker->fds[number].fd = is_masked ? -1 : source->fd;
}

void kvl_worker_put_off(struct kvl_worker *worker, kvl_handler *handle, void *context, uint64_t delay_ns)
{
	worker->later = handle;
	worker->later_context = context;
	worker->later_ns = handle ? kvl_monotonic_ns() + delay_ns : 0;
}

/* Do what was put off, if there is something and it is time, or (now). */
static void do_later(struct kvl_worker *worker, bool now)
{
	kvl_handler *handle = worker->later;

	if (!handle || (!now && kvl_monotonic_ns() < worker->later_ns))
		return;
	worker->later = NULL;
	handle(worker->later_context);
}

static void drain(int eventfd)
{
	uint64_t count;

	/* Empty already, or interrupted: either way the caller looks at what it announced. */
	if (read(eventfd, &count, sizeof(count)) < 0)
		return;
}

/* Whether a source has work that can be seen without its descriptor. */
static bool has_work(const struct kvl_source *source)
{
	if (source->is_masked)
		return false;
	if (source->queue)
		return kvl_virtq_has_chain(source->queue);
	return source->has_work && source->has_work(source->context);
}

/* Returns 0 or what kvl_worker_run shall return. */
static int visit(struct kvl_worker *worker, uint32_t number)
{
	struct kvl_source *source = &worker->sources[number];
	int code;

	worker->handled++;
	code = source->handle(source->context);
	if (source->queue && source->queue->fault) {
		kvl_worker_mask(worker, number, true);
		code = KVL_WORKER_QUEUE_FAULT;
	}
	if (code)
		worker->returned_source = number;
	return code;
}

/* Visit each source with work that can be seen; returns a code for kvl_worker_run, and in (ret) whether there was any. */
static int visit_queues(struct kvl_worker *worker, bool *ret)
{
	*ret = false;
	for (uint32_t i = 0; i < worker->count; i++) {
		int code;

		if (!has_work(&worker->sources[i]))
			continue;
		*ret = true;
		code = visit(worker, i);
		if (code)
			return code;
	}
	return 0;
}

static void set_kicks(struct kvl_worker *worker, bool wanted)
{
	for (uint32_t i = 0; i < worker->count; i++) {
		struct kvl_virtq *queue = worker->sources[i].queue;

		if (!queue || worker->sources[i].is_masked)
			continue;
		if (wanted)
			kvl_virtq_enable_notify(queue);
		else
			kvl_virtq_disable_notify(queue);
	}
}

/* poll(2), and no longer than until what was put off is to be done. */
static int wait_for(const struct kvl_worker *worker, struct pollfd *fds, uint32_t count, bool may_block)
{
	struct timespec timeout = {0};

	if (may_block && !worker->later)
		return poll(fds, count, -1);
	if (may_block) {
		uint64_t now_ns = kvl_monotonic_ns(), left_ns = worker->later_ns > now_ns ? worker->later_ns - now_ns : 0;

		timeout.tv_sec = (time_t)(left_ns / 1000000000);
		timeout.tv_nsec = (long)(left_ns % 1000000000);
	}
	return ppoll(fds, count, &timeout, NULL);
}

/* Wait, then the handlers of what is ready. Returns a code for kvl_worker_run; (ret): whether something was. */
static int wait_and_visit(struct kvl_worker *worker, bool may_block, bool *ret, bool *stop)
{
	struct pollfd ready[KVL_WORKER_MAX_SOURCES + 1];
	uint32_t count = worker->count;
	int code, events;

	/* The stop eventfd behind the sources; a copy, as handlers mask. */
	memcpy(ready, worker->fds, count * sizeof(ready[0]));
	ready[count] = worker->fds[KVL_WORKER_MAX_SOURCES];
	*ret = false;
	events = wait_for(worker, ready, count + 1, may_block);
	/* Before what was announced is taken notice of: see kvl_worker_is_waiting. */
	__atomic_store_n(&worker->waiting, 0, __ATOMIC_RELEASE);
	if (events <= 0) {
		do_later(worker, false);
		return 0; /* nothing, or EINTR; the caller looks again */
	}
	if (ready[count].revents) {
		drain(ready[count].fd);
		do_later(worker, true);
		*stop = true;
		return 0;
	}
	for (uint32_t i = 0; i < count; i++) {
		if (!ready[i].revents || worker->sources[i].is_masked)
			continue;
		*ret = true;
		if (worker->sources[i].queue) {
			drain(ready[i].fd);
			continue; /* visited with the others: visit_queues looks at the ring itself */
		}
		code = visit(worker, i);
		if (code)
			return code;
	}
	do_later(worker, false); /* last: a handler may have made it needless */
	return 0;
}

/* Look for work for a while, with kicks off; returns whether there is some. */
static bool spin(struct kvl_worker *worker)
{
	uint64_t begin, now;

	if (!worker->spin_ns)
		return false;
	begin = now = kvl_monotonic_ns();
	while (now - begin < worker->spin_ns) {
		for (uint32_t i = 0; i < worker->count; i++) {
			if (has_work(&worker->sources[i]))
				return true;
		}
		__builtin_ia32_pause();
		now = kvl_monotonic_ns();
	}
	return false;
}

/*
 * Work came (idle_ns) after the last was done. The next pause will be alike: spin through short ones, and longer each time
 * that was not enough; do not spin at all before long ones.
 */
static void learn(struct kvl_worker *worker, uint64_t idle_ns)
{
	if (idle_ns > worker->spin_max_ns) {
		worker->spin_ns = 0;
		return;
	}
	worker->spin_ns = worker->spin_ns ? 2 * worker->spin_ns : worker->spin_max_ns / 4;
	if (worker->spin_ns > worker->spin_max_ns)
		worker->spin_ns = worker->spin_max_ns;
}

/* Serve what can be seen until there is nothing for a while. */
static int serve_seen(struct kvl_worker *worker, bool *stop)
{
	uint64_t looked_ns = kvl_monotonic_ns();
	bool found;
	int code;

	do {
		code = visit_queues(worker, &found);
		if (code)
			return code;
		if (found && kvl_monotonic_ns() - looked_ns > BUSY_NS) {
			bool other;

			/* A busy queue must keep neither the stop nor other descriptors waiting. */
			code = wait_and_visit(worker, false, &other, stop);
			if (code || *stop)
				return code;
			looked_ns = kvl_monotonic_ns();
		}
	} while (found || spin(worker));
	return 0;
}

int kvl_worker_run(struct kvl_worker *worker)
{
	bool stop = false, found;
	int code;

	for (;;) {
		uint64_t idle_since;

		set_kicks(worker, false);
		code = serve_seen(worker, &stop);
		if (code || stop)
			return code;
		idle_since = worker->spin_max_ns ? kvl_monotonic_ns() - worker->spin_ns : 0;
		set_kicks(worker, true);
		code = visit_queues(worker, &found);
		if (code)
			return code;
		if (found)
			continue;
		worker->sleeps++;
		if (!worker->later)
			__atomic_store_n(&worker->waiting, 1, __ATOMIC_RELEASE);
		code = wait_and_visit(worker, true, &found, &stop);
		if (code || stop)
			return code;
		if (found && worker->spin_max_ns)
			learn(worker, kvl_monotonic_ns() - idle_since);
	}
}

bool kvl_worker_is_waiting(const struct kvl_worker *worker)
{
	return __atomic_load_n(&worker->waiting, __ATOMIC_ACQUIRE);
}
