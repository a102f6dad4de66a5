/*
 * A thread that serves queues without Python: it waits for kicks and other descriptors and calls their handlers.
 * Python starts the thread (kvl_worker_run with the GIL released) and has it back when there is something to decide.
 */
#ifndef KVL_WORKER_H
#define KVL_WORKER_H

#include <poll.h>
#include <stdbool.h>
#include <stdint.h>

#include "virtq.h"

enum {
	KVL_WORKER_MAX_SOURCES = 16,
	/* What kvl_worker_run returns beside the negative codes of handlers. */
	KVL_WORKER_STOPPED = 0,
	/* The driver broke the queue (see its fault): it is not served any more. */
	KVL_WORKER_QUEUE_FAULT = 1,
};

/*
 * Serve a source: until it is empty or (a budget of the handler's) is used up, then it is called again after the others.
 * Returns 0, or a negative code of its own that kvl_worker_run shall return; KVL_E_* of a pop are dealt with for it.
 */
typedef int kvl_handler(void *context);

/* Whether a source has work that its descriptor may not tell of yet. */
typedef bool kvl_has_work(const void *context);

struct kvl_source {
	kvl_handler *handle;
	kvl_has_work *has_work; /* or NULL; a queue needs none */
	void *context;
	struct kvl_virtq *queue; /* whose kicks the descriptor tells of, or NULL for any other descriptor */
	int fd;                  /* the caller's; a queue's kick eventfd must not block */
	bool is_masked;          /* not looked at, whatever is ready */
};

/* Set up by one thread, then owned by the one in kvl_worker_run. */
struct kvl_worker {
	struct kvl_source sources[KVL_WORKER_MAX_SOURCES];
	struct pollfd fds[KVL_WORKER_MAX_SOURCES + 1]; /* the last one is the stop eventfd */
	uint32_t count;
	uint32_t returned_source; /* whose handler made kvl_worker_run return */
	uint64_t spin_max_ns;     /* how long to look for work before sleeping, at most; 0 never spins */
	uint64_t spin_ns;         /* how long at the moment: as pauses have been of late; 0 if they were longer */
	uint64_t handled;         /* calls of handlers */
	uint64_t sleeps;          /* calls of poll(2) that could block */
	uint32_t waiting;         /* atomic; 1 while in one of these, and then all it was told of before has been served */
	/* What was put off, or NULL: see kvl_worker_put_off. */
	kvl_handler *later;
	void *later_context;
	uint64_t later_ns;
};

/* (stop_fd): an eventfd that ends kvl_worker_run when it is written to; the caller's, nonblocking. */
void kvl_worker_init(struct kvl_worker *worker, int stop_fd, uint64_t spin_max_ns);

/* Add a source before the worker runs; returns its number, or -1 if there is no room. (events) as in poll(2). */
int kvl_worker_add_queue(struct kvl_worker *worker, struct kvl_virtq *queue, int kick_fd, kvl_handler *handle,
			 void *context);
int kvl_worker_add_fd(struct kvl_worker *worker, int fd, short events, kvl_handler *handle, void *context);

/* Look at a source that is no queue before sleeping, and while spinning. Before the worker runs. */
void kvl_worker_watch(struct kvl_worker *worker, uint32_t source, kvl_has_work *has_work);

/* Forget all sources. Not while it runs. */
void kvl_worker_clear(struct kvl_worker *worker);

/*
 * Look at a source no longer, or again. A queue that is unmasked is visited soon, as its kicks may have been missed.
 * Thread: the worker's.
 */
void kvl_worker_mask(struct kvl_worker *worker, uint32_t source, bool is_masked);

/*
 * Call a handler after (delay_ns), or before kvl_worker_run returns because of its stop eventfd. There is one such call at
 * a time: this replaces the last; NULL takes it back. What the handler returns is not looked at.
 * Thread: the worker's.
 */
void kvl_worker_put_off(struct kvl_worker *worker, kvl_handler *handle, void *context, uint64_t delay_ns);

/*
 * Serve the sources until the stop eventfd is written to (KVL_WORKER_STOPPED) or there is something to decide: another
 * KVL_WORKER_*, or what a handler returned, and then (returned_source) is its number. May be called again; each queue
 * is visited once at the start.
 */
int kvl_worker_run(struct kvl_worker *worker);

/* Whether it sleeps, having served all that was announced before. Any thread. */
bool kvl_worker_is_waiting(const struct kvl_worker *worker);

#endif
