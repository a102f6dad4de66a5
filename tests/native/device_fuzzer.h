/*
 * Fuzzes devices that are served in Python: see device_fuzzer.c. Declared for cffi, too, from the line on that says so.
 */
#ifndef DEVICE_FUZZER_H
#define DEVICE_FUZZER_H

#include <stddef.h>
#include <stdint.h>

#include "mem.h"
#include "virtq.h"

/* cffi reads from here to the end mark. */
enum {
	FUZZ_QUEUES = 8,       /* of a device, at most */
	FUZZ_LOW_SIZE = 65536, /* guest RAM from address 0 */
	FUZZ_HIGH_GPA = 131072,
	FUZZ_HIGH_SIZE = 16384,
	FUZZ_DESC_GPA = 4096, /* rings of queue 0 */
	FUZZ_RINGS_SIZE = 2048, /* from the rings of one queue to those of the next */
	FUZZ_AVAIL_OFFSET = 1024,
	FUZZ_USED_OFFSET = 1280,
	FUZZ_MESSAGE_SIZE = 2048, /* bytes of a message, at most */
};

/* What is left to Python of an input. */
enum fuzz_kind { FUZZ_END, FUZZ_MESSAGE, FUZZ_KICK, FUZZ_HOST, FUZZ_CONFIG, FUZZ_RESET };

/* The first record of an input: how the driver sets the device up. */
struct fuzz_setup {
	uint64_t gpa;              /* of the part that is displaced */
	uint32_t refused_features; /* feature bits 0 to 31 that it does not take */
	uint16_t queue_sizes[FUZZ_QUEUES];
	uint8_t absent_queues; /* a bit for each queue that it does not set up */
	uint8_t queue;	       /* whose part is displaced */
	uint8_t part;	       /* 1 descriptor table, 2 available ring, 3 used ring; 0: nothing is displaced */
	uint8_t event_idx;
	uint8_t indirect;
};

/* A step for Python. */
struct fuzz_op {
	uint8_t queue, index, flags;
	uint32_t size;
	uint64_t value;
};

/* Guest RAM, and the largest size of each queue. Once; the memory stays the caller's and has to stay. */
void fuzz_begin(const struct kvl_mem *memory, const uint16_t *max_sizes, uint32_t queue_count);

/* The setup of the case under way. */
const struct fuzz_setup *fuzz_get_setup(void);

/* Do what the input says until Python has to do something: its kind, and what it is about in (ret). */
enum fuzz_kind fuzz_step(struct fuzz_op *ret);

/* Offer a chain with (data) as its readable part, cut and mixed as (op) says. */
void fuzz_offer(const struct fuzz_op *op, const uint8_t *data, uint32_t size);

/* The device was reset: it must not touch a queue it had. */
void fuzz_forget_queues(void);

/* Chains of a queue that the device has. */
uint32_t fuzz_in_flight(const struct kvl_virtq *queue);

/* Compare guest RAM with what it has to be, then clear it. */
void fuzz_check_memory(void);

/* Zero guest RAM, whatever is in it. */
void fuzz_clear_memory(void);

/* libFuzzer's main; calls fuzz_case() for each input. Returns its exit status, or exits. */
int fuzz_run(int argc, char **argv);

/* Where Python code notes the branches it takes. */
uint8_t *fuzz_branches(void);
uint32_t fuzz_branch_count(void);
/* end of what cffi reads */

#endif
