/*
 * Guest memory with a queue in it, as a hostile driver might write it: shared by the fuzz targets of devices.
 *
 * Under libFuzzer, rings_take_input() takes it from the input. Without it, rings_draw() makes plausible rings and breaks
 * them here and there, and rings_run_begin() starts a thread that goes on writing.
 */
#ifndef RINGS_H
#define RINGS_H

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "virtq.h"

enum {
	LOW_SIZE = 0x10000,
	HIGH_GPA = 0x20000,
	HIGH_SIZE = 0x8000,
	MAX_SIZE = 64, /* descriptors of a queue */
	DESC_GPA = 0x1000,
	AVAIL_GPA = 0x1400,
	USED_GPA = 0x1500,
	TABLES_GPA = 0x1800, /* indirect tables, and small buffers such as headers */
	TABLE_SIZE = 0x800,
	RINGS_END = 0x3800, /* of what the driver writes before each case */
	BUFFERS_GPA = 0x8000,
	RINGS_HEADER = 8, /* bytes of an input that say where the rings are */
};

static struct kvl_mem mem;

static inline void require(int condition, const char *what)
{
	if (!condition) {
		fprintf(stderr, "fuzz: %s\n", what);
		abort();
	}
}

/* Once. */
static inline void rings_map(void)
{
	const uint64_t gpas[2] = {0, HIGH_GPA}, sizes[2] = {LOW_SIZE, HIGH_SIZE};

	for (unsigned i = 0; i < 2; i++) {
		mem.regions[i].gpa = gpas[i];
		mem.regions[i].size = sizes[i];
		mem.regions[i].hva = kvl_mem_map(sizes[i], -1, 0, false);
		require(mem.regions[i].hva != NULL, "cannot map memory");
	}
	mem.count = 2;
}

static inline int is_guest_ram(const void *base, uint64_t size)
{
	for (uint32_t i = 0; i < mem.count; i++) {
		uintptr_t start = (uintptr_t)mem.regions[i].hva, at = (uintptr_t)base;

		if (at >= start && at - start < mem.regions[i].size && size <= mem.regions[i].size - (at - start))
			return 1;
	}
	return 0;
}

/* Guest RAM from the descriptor table on; the rest of what a driver writes is zeros. */
static inline void rings_fill(const uint8_t *data, size_t size)
{
	memset(mem.regions[0].hva, 0, RINGS_END);
	if (size > RINGS_END - DESC_GPA)
		size = RINGS_END - DESC_GPA;
	memcpy(mem.regions[0].hva + DESC_GPA, data, size);
}

/* Read where the queue is from the RINGS_HEADER first bytes of an input; 0 if it is none. */
static inline int rings_from_input(const uint8_t *data, struct kvl_virtq_layout *ret)
{
	*ret = (struct kvl_virtq_layout){.desc_gpa = DESC_GPA, .avail_gpa = AVAIL_GPA, .used_gpa = USED_GPA};
	ret->size = data[0] & 0x80 ? data[0] & 0x7f : 1u << (data[0] % 7);
	ret->event_idx = data[1] & 1;
	ret->indirect = data[1] & 2;
	if (data[1] & 4)
		ret->desc_gpa = (uint64_t)data[2] << 9 | data[3];
	if (data[1] & 8)
		ret->avail_gpa = (uint64_t)data[4] << 9 | data[5];
	if (data[1] & 16)
		ret->used_gpa = (uint64_t)data[6] << 9 | data[7];
	return ret->size <= MAX_SIZE;
}

/* An input in its parts; what is behind the steps is what the driver has written. */
struct rings_input {
	struct kvl_virtq_layout layout;
	const uint8_t *options, *steps;
	size_t count; /* of steps */
};

/* Take an input with so many bytes of options and at most so many steps apart, and fill guest RAM; 0 if it is none. */
static inline int rings_take_input(const uint8_t *data, size_t size, size_t options, size_t steps,
				   struct rings_input *ret)
{
	if (mem.count == 0)
		rings_map();
	if (size < RINGS_HEADER + options || !rings_from_input(data, &ret->layout))
		return 0;
	ret->options = data + RINGS_HEADER;
	ret->steps = ret->options + options;
	size -= RINGS_HEADER + options;
	ret->count = size < steps ? size : steps;
	rings_fill(ret->steps + ret->count, size - ret->count);
	return 1;
}

/* The driver offers (count) chains more. */
static inline void rings_advance(uint32_t count)
{
	mem.regions[0].hva[AVAIL_GPA + 2] = (uint8_t)(mem.regions[0].hva[AVAIL_GPA + 2] + count);
}

#ifndef KVL_LIBFUZZER
#include <pthread.h>
#include <sched.h>

static uint64_t draw_state, scribbles;

static inline void draw_seed(uint64_t seed)
{
	draw_state = seed * 0x9e3779b97f4a7c15u | 1;
}

static inline uint32_t draw(uint32_t below)
{
	draw_state ^= draw_state << 13;
	draw_state ^= draw_state >> 7;
	draw_state ^= draw_state << 17;
	return (uint32_t)(draw_state >> 32) % below;
}

static inline void put(uint8_t *at, uint64_t value, unsigned size)
{
	memcpy(at, &value, size); /* little-endian hosts only */
}

static inline uint64_t draw_gpa(void)
{
	static const uint64_t edges[] = {0, LOW_SIZE - 1, LOW_SIZE, HIGH_GPA - 1, HIGH_GPA + HIGH_SIZE - 16,
					 HIGH_GPA + HIGH_SIZE, UINT64_MAX - 7, UINT64_MAX, UINT64_C(1) << 63};

	if (draw(60) == 0)
		return edges[draw(sizeof(edges) / sizeof(edges[0]))];
	return (draw(2) ? (uint64_t)BUFFERS_GPA : (uint64_t)HIGH_GPA) + draw(0x6000);
}

/* A descriptor as drivers write them, with a mistake now and then. */
static inline void draw_desc(uint8_t *at, uint32_t index, uint32_t count, int may_refer, int is_writable)
{
	uint16_t flags = is_writable ? 2 : 0;
	uint32_t size = draw(30) == 0 ? 0 : 1 + draw(0x1800), next = index + 1;
	uint64_t gpa = draw_gpa();

	if (draw(3) && index + 1 < count)
		flags |= 1;
	if (may_refer && draw(6) == 0) {
		flags = (uint16_t)(4 | (draw(8) == 0) | (draw(2) << 1));
		gpa = draw(20) ? TABLES_GPA + 16 * (uint64_t)draw(256) + draw(2) * draw(16) : HIGH_GPA + HIGH_SIZE - draw(64);
		size = draw(12) ? 16 * (1 + draw(80)) : draw(40);
	}
	if (draw(40) == 0)
		flags = (uint16_t)draw(8);
	if (draw(40) == 0)
		next = draw(200);
	if (draw(200) == 0)
		size = UINT32_MAX - draw(3);
	put(at, gpa, 8);
	put(at + 8, size, 4);
	put(at + 12, flags, 2);
	put(at + 14, next, 2);
}

static inline void draw_table(uint64_t gpa, uint32_t count, int may_refer)
{
	uint32_t first_writable = draw(count + 1);

	for (uint32_t i = 0; i < count; i++)
		draw_desc(mem.regions[0].hva + gpa + 16 * i, i, count, may_refer, i >= first_writable);
}

/* Rings of one case, in guest memory. */
static inline struct kvl_virtq_layout rings_draw(void)
{
	struct kvl_virtq_layout layout = {
		.desc_gpa = draw(30) ? (uint64_t)DESC_GPA : draw_gpa(),
		.avail_gpa = draw(30) ? (uint64_t)AVAIL_GPA : draw_gpa(),
		.used_gpa = draw(30) ? (uint64_t)USED_GPA : draw_gpa(),
		.size = draw(30) ? 1u << draw(7) : draw(MAX_SIZE + 1),
		.event_idx = draw(2),
		.indirect = draw(8) != 0,
	};
	uint8_t *avail = mem.regions[0].hva + AVAIL_GPA;
	uint32_t size = layout.size ? layout.size : 1;

	memset(mem.regions[0].hva + DESC_GPA, 0, RINGS_END - DESC_GPA);
	draw_table(DESC_GPA, size, 1);
	for (unsigned i = 0; i < 4; i++)
		draw_table(TABLES_GPA + TABLE_SIZE * (uint64_t)i, 128, draw(10) == 0);
	for (uint32_t i = 0; i < size; i++)
		put(avail + 4 + 2 * i, draw(60) ? draw(size) : draw(0x10000), 2);
	put(avail + 2, draw(40) ? draw(size + 1) : draw(0x10000), 2);
	put(avail, draw(2), 2);
	return layout;
}

enum {
	RACE_ENOUGH = 200,   /* what must get through while a thread scribbles */
	RACE_PATIENCE = 100, /* times as many cases at most: how fast that thread is differs much */
};

/* What main(seed, cases, "race") was asked for: so many cases, and a thread that scribbles over the rings meanwhile? */
struct rings_run {
	uint64_t cases, done;
	int races, stop;
	pthread_t thread;
};

static inline void *rings_scribble(void *stop)
{
	uint64_t own = 88172645463325252u;

	while (!__atomic_load_n((int *)stop, __ATOMIC_RELAXED)) {
		own ^= own << 13;
		own ^= own >> 7;
		own ^= own << 17;
		__atomic_store_n(mem.regions[0].hva + DESC_GPA + own % (RINGS_END - DESC_GPA), (uint8_t)(own >> 40),
				 __ATOMIC_RELAXED);
		__atomic_add_fetch(&scribbles, 1, __ATOMIC_RELAXED);
	}
	return NULL;
}

static inline void rings_run_begin(struct rings_run *run, int argc, char **argv)
{
	draw_seed(argc > 1 ? strtoull(argv[1], NULL, 10) : 1);
	run->cases = argc > 2 ? strtoull(argv[2], NULL, 10) : 10000;
	run->done = 0;
	run->races = argc > 3;
	run->stop = 0;
	rings_map();
	if (run->races)
		require(pthread_create(&run->thread, NULL, rings_scribble, &run->stop) == 0, "cannot start a thread");
	while (run->races && !__atomic_load_n(&scribbles, __ATOMIC_RELAXED))
		sched_yield();
}

/* One case more? A race goes on until enough got through, however the host's scheduler shares the time. */
static inline int rings_run_next(struct rings_run *run, uint64_t through)
{
	uint64_t done = run->done++;

	return done < run->cases || (run->races && through < RACE_ENOUGH && done < RACE_PATIENCE * run->cases);
}

static inline void rings_run_end(struct rings_run *run)
{
	__atomic_store_n(&run->stop, 1, __ATOMIC_RELAXED);
	if (run->races)
		pthread_join(run->thread, NULL);
}
#endif
#endif
