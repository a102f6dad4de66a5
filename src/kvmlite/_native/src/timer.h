/* CLOCK_MONOTONIC, and a timerfd(2) of it as a source of a worker. */
#ifndef KVL_TIMER_H
#define KVL_TIMER_H

#include <stdint.h>
#include <sys/timerfd.h>
#include <time.h>

uint64_t kvl_monotonic_ns(void);

/* Have (fd) readable in (ns), at least 1, once. 0 or an errno. */
int kvl_timer_arm(int fd, uint64_t ns);

/* Take notice of an expiry. */
void kvl_timer_drain(int fd);

#endif
