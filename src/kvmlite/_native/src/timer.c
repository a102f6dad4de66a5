#include "timer.h"

#include <errno.h>
#include <unistd.h>

uint64_t kvl_monotonic_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

int kvl_timer_arm(int fd, uint64_t ns)
{
	const uint64_t second_ns = 1000000000;
	struct itimerspec when = {.it_value = {.tv_sec = (time_t)(ns / second_ns), .tv_nsec = (long)(ns % second_ns)}};

	return timerfd_settime(fd, 0, &when, NULL) < 0 ? errno : 0;
}

void kvl_timer_drain(int fd)
{
	uint64_t expiries;

	/* Empty already, or interrupted: the caller looks at what it waited for all the same. */
	if (read(fd, &expiries, sizeof(expiries)) < 0)
		return;
}
