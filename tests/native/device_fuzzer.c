/*
 * Fuzzes devices that are served in Python, with libFuzzer: this file is linked into a copy of the data plane built with
 * its instrumentation and the sanitizers, and calls back into Python for each input (scripts/fuzzkit).
 *
 * An input is records of 16 bytes: how the driver sets the device up, then its steps. Those that only change guest RAM
 * are done here. What the device does to its queues passes here, too, because the linker wraps (-Wl,--wrap) the
 * functions of virtq.h and mem.h that Python calls: each chain must be returned once at most, with no more bytes than it
 * takes, and no byte of guest RAM may change but those and the used rings. A breach aborts, and libFuzzer keeps the input.
 */
#include "device_fuzzer.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
	RECORD = 16,
	PAGE = 4096,
	TABLES_GPA = FUZZ_DESC_GPA + FUZZ_QUEUES * FUZZ_RINGS_SIZE, /* indirect tables */
	TABLES = 4,
	TABLE_SIZE = 1024,
	BUFFERS_GPA = TABLES_GPA + TABLES * TABLE_SIZE,
	MESSAGES = 16, /* buffers for messages, used in turn */
	ANSWERS_GPA = BUFFERS_GPA + MESSAGES * FUZZ_MESSAGE_SIZE,
	DESC_SIZE = 16,
	NEXT = 1,
	WRITE = 2,
	INDIRECT = 4,
	BRANCHES = 8192,
	MAX_HEADS = 256, /* of the largest queue of a device in Python */
	MAX_SLOTS = 64, /* what there is room for between the parts of a queue */
};

_Static_assert(ANSWERS_GPA + PAGE < FUZZ_LOW_SIZE, "guest RAM is too small");

/* Kinds of records after the first. */
enum record_kind {
	PUT_DESC,
	PUT_TABLE_DESC,
	PUT_INDIRECT,
	PUT_BYTES,
	OFFER,
	SET_AVAIL,
	SET_USED_EVENT,
	MESSAGE,
	KICK,
	HOST,
	CONFIG,
	RESET,
	RECORD_KINDS,
};

struct record {
	uint8_t kind, queue, index, flags;
	uint32_t size;
	uint64_t gpa;
};

_Static_assert(sizeof(struct record) == RECORD, "a record has another size");

/* A chain the device has. */
struct flight {
	struct flight *next;
	uint64_t writable_size;
	uint32_t writable_count;
	uint16_t head;
	struct iovec writable[];
};

struct seen_queue {
	const struct kvl_virtq *queue;
	const uint8_t *used_ring; /* NULL if the queue was refused */
	uint32_t used_ring_size;
	struct flight *flights;
	uint32_t in_flight;
	uint16_t returned[MAX_HEADS]; /* of the chains in the list, by head */
};

int fuzz_case(void); /* in Python */
int LLVMFuzzerRunDriver(int *argc, char ***argv, int (*one)(const uint8_t *data, size_t size));
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

static const struct kvl_mem *mem;
static uint32_t queue_count;
static uint16_t max_sizes[FUZZ_QUEUES];

static const uint8_t *input;
static size_t records, at; /* of the input; the one that comes next */
static struct fuzz_setup setup;
static uint16_t avail_idx[FUZZ_QUEUES];
static uint32_t messages;

static struct seen_queue queues[FUZZ_QUEUES];
static uint64_t served, faults; /* chains that were returned, queues that were broken */
static uint8_t low_shadow[FUZZ_LOW_SIZE], high_shadow[FUZZ_HIGH_SIZE]; /* what guest RAM has to be */
static uint32_t dirty;						       /* a bit for each page that is not all zeros */

/* libFuzzer clears these before each input and looks at them afterwards. */
__attribute__((section("__libfuzzer_extra_counters"))) static uint8_t branches[BRANCHES];

static void require(bool condition, const char *what)
{
	if (!condition) {
		fprintf(stderr, "fuzz: %s\n", what);
		abort();
	}
}

/* ---- guest RAM ---- */

static uint8_t *shadow_at(const uint8_t *hva, uint64_t size)
{
	for (uint32_t i = 0; i < mem->count; i++) {
		const struct kvl_region *region = &mem->regions[i];
		uintptr_t start = (uintptr_t)region->hva, offset = (uintptr_t)hva - start;

		if ((uintptr_t)hva < start || offset >= region->size)
			continue;
		if (size > region->size - offset)
			return NULL;
		return (i ? high_shadow : low_shadow) + offset;
	}
	return NULL;
}

/* The device, or the driver, was right to change these bytes. */
static void accept_bytes(const uint8_t *hva, uint64_t size)
{
	uint8_t *shadow = size ? shadow_at(hva, size) : NULL;
	bool is_high;
	uint32_t first, last;

	if (size == 0)
		return;
	require(shadow != NULL, "touches bytes outside guest RAM");
	memcpy(shadow, hva, size);
	is_high = shadow >= high_shadow && shadow < high_shadow + FUZZ_HIGH_SIZE;
	first = (uint32_t)(shadow - (is_high ? high_shadow : low_shadow)) / PAGE;
	last = (uint32_t)(shadow + size - 1 - (is_high ? high_shadow : low_shadow)) / PAGE;
	for (uint32_t page = first; page <= last; page++)
		dirty |= UINT32_C(1) << (page + (is_high ? FUZZ_LOW_SIZE / PAGE : 0));
}

/* The driver writes; what lies outside RAM goes nowhere. */
static void put(uint64_t gpa, const void *data, uint64_t size)
{
	uint8_t *hva = kvl_mem_at(mem, gpa, size);

	if (!hva || size == 0)
		return;
	memcpy(hva, data, size);
	accept_bytes(hva, size);
}

static void put_le16(uint64_t gpa, uint16_t value)
{
	put(gpa, &value, sizeof(value)); /* little-endian hosts only */
}

static void clear_memory(void)
{
	for (uint32_t page = 0; page < (FUZZ_LOW_SIZE + FUZZ_HIGH_SIZE) / PAGE; page++) {
		uint32_t high = page - FUZZ_LOW_SIZE / PAGE;

		if (!(dirty >> page & 1))
			continue;
		if (page < FUZZ_LOW_SIZE / PAGE) {
			memset(mem->regions[0].hva + page * PAGE, 0, PAGE);
			memset(low_shadow + page * PAGE, 0, PAGE);
		} else {
			memset(mem->regions[1].hva + high * PAGE, 0, PAGE);
			memset(high_shadow + high * PAGE, 0, PAGE);
		}
	}
	dirty = 0;
}

void fuzz_check_memory(void)
{
	if (memcmp(mem->regions[0].hva, low_shadow, FUZZ_LOW_SIZE) != 0 ||
	    memcmp(mem->regions[1].hva, high_shadow, FUZZ_HIGH_SIZE) != 0) {
		for (uint32_t i = 0; i < FUZZ_LOW_SIZE; i++)
			if (mem->regions[0].hva[i] != low_shadow[i])
				fprintf(stderr, "fuzz: changed at %#x\n", i);
		for (uint32_t i = 0; i < FUZZ_HIGH_SIZE; i++)
			if (mem->regions[1].hva[i] != high_shadow[i])
				fprintf(stderr, "fuzz: changed at %#x\n", FUZZ_HIGH_GPA + i);
		require(false, "guest RAM changed where the device must not write");
	}
	clear_memory();
}

void fuzz_clear_memory(void)
{
	dirty = UINT32_MAX;
	clear_memory();
}

void fuzz_begin(const struct kvl_mem *memory, const uint16_t *sizes, uint32_t count)
{
	require(count <= FUZZ_QUEUES, "the device has too many queues");
	mem = memory;
	memcpy(max_sizes, sizes, count * sizeof(sizes[0]));
	queue_count = count;
}

/* ---- what the device does to its queues ---- */

int __real_kvl_virtq_init(struct kvl_virtq *q, const struct kvl_mem *memory, const struct kvl_virtq_layout *layout);
int __wrap_kvl_virtq_init(struct kvl_virtq *q, const struct kvl_mem *memory, const struct kvl_virtq_layout *layout);
int __real_kvl_virtq_pop(struct kvl_virtq *q, struct kvl_chain *ret);
int __wrap_kvl_virtq_pop(struct kvl_virtq *q, struct kvl_chain *ret);
void __real_kvl_virtq_push(struct kvl_virtq *q, uint16_t head, uint32_t written);
void __wrap_kvl_virtq_push(struct kvl_virtq *q, uint16_t head, uint32_t written);
int __real_kvl_mem_discard(uint8_t *hva, uint64_t size, int fd, uint64_t offset);
int __wrap_kvl_mem_discard(uint8_t *hva, uint64_t size, int fd, uint64_t offset);

static struct seen_queue *find_queue(const struct kvl_virtq *q)
{
	for (uint32_t i = 0; i < FUZZ_QUEUES; i++)
		if (queues[i].queue == q)
			return &queues[i];
	return NULL;
}

int __wrap_kvl_virtq_init(struct kvl_virtq *q, const struct kvl_mem *memory, const struct kvl_virtq_layout *layout)
{
	struct seen_queue *seen = find_queue(NULL);
	int code = __real_kvl_virtq_init(q, memory, layout);

	require(seen != NULL, "more queues than the device has");
	*seen = (struct seen_queue){.queue = q};
	if (code == KVL_OK) {
		seen->used_ring = (const uint8_t *)q->used_ring;
		seen->used_ring_size = 6 + 8 * (uint32_t)q->size;
	}
	return code;
}

int __wrap_kvl_virtq_pop(struct kvl_virtq *q, struct kvl_chain *ret)
{
	struct seen_queue *seen = find_queue(q);
	bool was_broken = q->fault != 0;
	int code = __real_kvl_virtq_pop(q, ret);
	struct flight *flight;
	uint64_t size = 0;

	require(seen != NULL, "pops from a queue it was to forget");
	if (code < 0 && !was_broken)
		faults++;
	if (code != 1)
		return code;
	flight = malloc(sizeof(*flight) + ret->writable_count * sizeof(struct iovec));
	require(flight != NULL, "out of memory");
	flight->next = seen->flights;
	flight->head = ret->head;
	flight->writable_count = ret->writable_count;
	flight->writable_size = ret->writable_size;
	if (ret->writable_count)
		memcpy(flight->writable, ret->iov + ret->readable_count, ret->writable_count * sizeof(struct iovec));
	for (uint32_t i = 0; i < (uint32_t)ret->readable_count + ret->writable_count; i++) {
		require(shadow_at(ret->iov[i].iov_base, ret->iov[i].iov_len) != NULL, "buffer outside guest RAM");
		size += ret->iov[i].iov_len;
	}
	require(size == ret->readable_size + ret->writable_size, "sizes do not add up");
	seen->flights = flight;
	seen->in_flight++;
	require(ret->head < MAX_HEADS && ret->head < q->size && seen->in_flight <= q->size, "more chains in flight than descriptors");
	return code;
}

static void accept_written(const struct flight *flight, uint64_t size)
{
	for (uint32_t i = 0; i < flight->writable_count && size; i++) {
		uint64_t length = flight->writable[i].iov_len < size ? flight->writable[i].iov_len : size;

		accept_bytes(flight->writable[i].iov_base, length);
		size -= length;
	}
}

static void drop_flights(struct seen_queue *seen, uint16_t head)
{
	for (struct flight **link = &seen->flights; *link;) {
		struct flight *flight = *link;

		if (flight->head == head) {
			*link = flight->next;
			free(flight);
		} else {
			link = &flight->next;
		}
	}
	seen->returned[head] = 0;
}

/*
 * A hostile driver may offer a head again while the device has it. Which of its chains is returned, the device does not
 * say: any of them may have been written to, and all are kept until the last one is back.
 */
void __wrap_kvl_virtq_push(struct kvl_virtq *q, uint16_t head, uint32_t written)
{
	struct seen_queue *seen = find_queue(q);
	uint32_t out = 0;
	bool has_room = false;

	require(seen != NULL, "returns a chain to a queue it was to forget");
	for (const struct flight *flight = seen->flights; flight; flight = flight->next) {
		if (flight->head != head)
			continue;
		out++;
		has_room = has_room || written <= flight->writable_size;
		accept_written(flight, written);
	}
	require(out > seen->returned[head], "returns a chain it does not have");
	require(has_room, "claims to have written more than the chain takes");
	if (++seen->returned[head] == out)
		drop_flights(seen, head);
	seen->in_flight--;
	served++;
	__real_kvl_virtq_push(q, head, written);
}

int __wrap_kvl_mem_discard(uint8_t *hva, uint64_t size, int fd, uint64_t offset)
{
	int result;

	require(shadow_at(hva, size) != NULL, "gives back memory outside guest RAM");
	result = __real_kvl_mem_discard(hva, size, fd, offset);
	accept_bytes(hva, size);
	return result;
}

void fuzz_forget_queues(void)
{
	for (uint32_t i = 0; i < FUZZ_QUEUES; i++) {
		if (queues[i].used_ring)
			accept_bytes(queues[i].used_ring, queues[i].used_ring_size);
		while (queues[i].flights) {
			struct flight *flight = queues[i].flights;

			accept_written(flight, flight->writable_size);
			queues[i].flights = flight->next;
			free(flight);
		}
		queues[i] = (struct seen_queue){0};
	}
}

uint32_t fuzz_in_flight(const struct kvl_virtq *queue)
{
	const struct seen_queue *seen = find_queue(queue);

	return seen ? seen->in_flight : 0;
}

/* ---- an input ---- */

/* Mostly inside RAM, often at its edges, sometimes anywhere. */
static uint64_t to_gpa(uint64_t raw)
{
	static const uint64_t edges[8] = {
		0,
		FUZZ_LOW_SIZE,
		FUZZ_HIGH_GPA,
		FUZZ_HIGH_GPA + FUZZ_HIGH_SIZE,
		UINT64_C(0xd0000000),
		UINT64_C(1) << 32,
		UINT64_C(1) << 63,
		0,
	};
	uint32_t mode = (uint32_t)(raw >> 56);

	if (mode < 0xa0)
		return BUFFERS_GPA + raw % (FUZZ_LOW_SIZE - BUFFERS_GPA);
	if (mode < 0xc0)
		return FUZZ_HIGH_GPA + raw % FUZZ_HIGH_SIZE;
	if (mode < 0xd0)
		return raw % FUZZ_LOW_SIZE;
	if (mode < 0xf0)
		return edges[raw & 7] + (raw >> 3 & 3) * 8 - (raw >> 5 & 31);
	return raw << 8;
}

static uint32_t to_size(uint32_t raw)
{
	static const uint32_t edges[16] = {0,	   1,	       2,	   3,	      4,      8,      16,	43,
					   44,	   45,	       0x1000,	   0x4000,    0x10000, 0x7fffffff, 0x80000000, 0xffffffff};
	uint32_t mode = raw >> 24;

	if (mode < 0xa0)
		return raw & 0xff;
	if (mode < 0xd0)
		return raw & 0xfff;
	return mode < 0xf0 ? edges[raw & 15] : raw;
}

static uint64_t rings_gpa(uint32_t queue)
{
	return FUZZ_DESC_GPA + (uint64_t)queue * FUZZ_RINGS_SIZE;
}

static uint32_t slots(uint32_t queue)
{
	uint32_t size = setup.queue_sizes[queue];

	return size && size <= MAX_SLOTS ? size : MAX_SLOTS;
}

static void put_descriptor(uint64_t table, uint32_t index, uint64_t gpa, uint32_t size, uint16_t flags, uint16_t next)
{
	struct {
		uint64_t gpa;
		uint32_t size;
		uint16_t flags, next;
	} desc = {gpa, size, flags, next};

	put(table + index * DESC_SIZE, &desc, sizeof(desc));
}

static void put_record_descriptor(const struct record *record, uint64_t table, uint32_t index, uint32_t size)
{
	const uint16_t nexts[8] = {0, 0, 0xffff, (uint16_t)size, 64, 63, 0x8000, 1};
	uint32_t how = record->flags >> 4;
	uint16_t next = (uint16_t)(how < 8 ? index + 1 : nexts[how - 8]);

	if (how == 8)
		next = (uint16_t)index;
	put_descriptor(table, index, to_gpa(record->gpa), to_size(record->size),
		       (uint16_t)((record->flags & 7) | (record->flags & 8 ? 0xfff0 : 0)), next);
}

static void offer(uint32_t queue, uint16_t head)
{
	uint64_t avail = rings_gpa(queue) + FUZZ_AVAIL_OFFSET;

	put_le16(avail + 4 + 2 * (avail_idx[queue] % slots(queue)), head);
	put_le16(avail + 2, ++avail_idx[queue]);
}

void fuzz_offer(const struct fuzz_op *op, const uint8_t *data, uint32_t size)
{
	uint64_t gpa = BUFFERS_GPA + (uint64_t)(messages++ % MESSAGES) * FUZZ_MESSAGE_SIZE;
	uint64_t table = rings_gpa(op->queue);
	uint32_t index = op->index % slots(op->queue), cut, used = index;
	bool is_cut = op->flags & 1, has_answer = op->flags & 2, is_indirect = op->flags & 4;

	if (size > FUZZ_MESSAGE_SIZE)
		size = FUZZ_MESSAGE_SIZE;
	put(gpa, data, size);
	if (is_indirect) {
		table = TABLES_GPA + (uint64_t)(op->index % TABLES) * TABLE_SIZE;
		used = 0;
	}
	cut = is_cut ? (uint32_t)(op->value >> 48) % (size + 1) : 0;
	if (is_cut) {
		put_descriptor(table, used, gpa, cut, NEXT, (uint16_t)(used + 1));
		used++;
	}
	put_descriptor(table, used, gpa + cut, size - cut, has_answer ? NEXT : 0, (uint16_t)(used + 1));
	used++;
	if (has_answer) {
		put_descriptor(table, used, ANSWERS_GPA + op->value % PAGE, to_size(op->size), WRITE, 0);
		used++;
	}
	if (is_indirect)
		put_descriptor(rings_gpa(op->queue), index, table, DESC_SIZE * used, INDIRECT, 0);
	offer(op->queue, (uint16_t)index);
}

static enum fuzz_kind for_python(const struct record *record, struct fuzz_op *ret)
{
	static const enum fuzz_kind kinds[RECORD_KINDS] = {
		[OFFER] = FUZZ_KICK, [MESSAGE] = FUZZ_MESSAGE, [KICK] = FUZZ_KICK,
		[HOST] = FUZZ_HOST,  [CONFIG] = FUZZ_CONFIG,   [RESET] = FUZZ_RESET,
	};

	ret->queue = (uint8_t)(record->queue % queue_count);
	ret->index = record->index;
	ret->flags = record->flags;
	ret->size = record->size;
	ret->value = record->gpa;
	if (record->kind % RECORD_KINDS == RESET) { /* as a driver does: with empty rings */
		uint8_t zeros[FUZZ_RINGS_SIZE] = {0};

		for (uint32_t queue = 0; queue < queue_count; queue++)
			put(rings_gpa(queue) + FUZZ_AVAIL_OFFSET, zeros, FUZZ_RINGS_SIZE - FUZZ_AVAIL_OFFSET);
		memset(avail_idx, 0, sizeof(avail_idx));
	}
	return kinds[record->kind % RECORD_KINDS];
}

enum fuzz_kind fuzz_step(struct fuzz_op *ret)
{
	while (at < records) {
		struct record record;
		uint32_t queue, index, count;

		memcpy(&record, input + RECORD * at++, RECORD);
		queue = record.queue % queue_count;
		index = record.index % 64;
		switch (record.kind % RECORD_KINDS) {
		case PUT_DESC:
			put_record_descriptor(&record, rings_gpa(queue), index, slots(queue));
			break;
		case PUT_TABLE_DESC:
			put_record_descriptor(&record, TABLES_GPA + (uint64_t)(record.queue % TABLES) * TABLE_SIZE, index,
					      MAX_SLOTS);
			break;
		case PUT_INDIRECT:
			put_descriptor(rings_gpa(queue), index, TABLES_GPA + (uint64_t)(record.flags % TABLES) * TABLE_SIZE,
				       record.size >> 24 < 0xf0 ? DESC_SIZE * (record.size % 80) : record.size,
				       (uint16_t)(INDIRECT | record.flags >> 6), (uint16_t)(index + 1));
			break;
		case PUT_BYTES:
			put(record.size % FUZZ_LOW_SIZE, &record.gpa, 1 + record.index % 8);
			break;
		case OFFER:
			count = (record.flags & 63) == 63 ? MAX_SLOTS : 1 + (record.flags & 3);
			while (count--)
				offer(queue, record.size >> 31 ? (uint16_t)record.size : (uint16_t)(record.index % slots(queue)));
			if (record.flags & 128)
				return for_python(&record, ret);
			break;
		case SET_AVAIL:
			avail_idx[queue] = (uint16_t)record.size;
			put_le16(rings_gpa(queue) + FUZZ_AVAIL_OFFSET, record.flags);
			put_le16(rings_gpa(queue) + FUZZ_AVAIL_OFFSET + 2, (uint16_t)record.size);
			break;
		case SET_USED_EVENT:
			put_le16(rings_gpa(queue) + FUZZ_AVAIL_OFFSET + 4 + 2 * slots(queue), (uint16_t)record.size);
			break;
		default:
			return for_python(&record, ret);
		}
	}
	return FUZZ_END;
}

const struct fuzz_setup *fuzz_get_setup(void)
{
	return &setup;
}

static void read_setup(const uint8_t *data)
{
	uint64_t gpa;

	memcpy(&gpa, data + 8, sizeof(gpa));
	memcpy(&setup.refused_features, data + 4, sizeof(setup.refused_features));
	setup.event_idx = data[0] & 1;
	setup.indirect = !(data[0] & 2);
	setup.absent_queues = data[1] & 0x80 ? data[1] & 0x7f : 0;
	for (uint32_t queue = 0; queue < queue_count; queue++) {
		uint32_t size = 1u << (6 - data[2] % 7);

		if (size > max_sizes[queue])
			size = max_sizes[queue];
		setup.queue_sizes[queue] = (uint16_t)(data[2] & 0x80 ? data[2] & 0x7f : size);
	}
	setup.queue = data[3] % FUZZ_QUEUES;
	setup.part = data[3] & 0x40 ? data[3] >> 4 & 3 : 0;
	setup.gpa = to_gpa(gpa) & ~(uint64_t)(data[3] & 8 ? 0 : 15);
}

static int run_input(const uint8_t *data, size_t size)
{
	if (size < RECORD)
		return 0;
	input = data;
	records = size / RECORD;
	at = 1;
	messages = 0;
	memset(avail_idx, 0, sizeof(avail_idx));
	read_setup(data);
	return fuzz_case();
}

static void tell(void)
{
	fprintf(stderr, "chains served: %llu, rings broken: %llu\n", (unsigned long long)served, (unsigned long long)faults);
}

int fuzz_run(int argc, char **argv)
{
	atexit(tell);
	return LLVMFuzzerRunDriver(&argc, &argv, run_input);
}

uint8_t *fuzz_branches(void)
{
	return branches;
}

uint32_t fuzz_branch_count(void)
{
	return BRANCHES;
}

/* ---- mutations that keep records whole ---- */

static uint64_t draw_state;

static uint32_t draw(uint32_t below)
{
	draw_state ^= draw_state << 13;
	draw_state ^= draw_state >> 7;
	draw_state ^= draw_state << 17;
	return (uint32_t)(draw_state >> 32) % below;
}

static void draw_record(uint8_t *to)
{
	/* Messages and kicks are what gets far. */
	static const uint8_t kinds[16] = {PUT_DESC,	  PUT_DESC, PUT_TABLE_DESC, PUT_INDIRECT, OFFER, OFFER, MESSAGE, MESSAGE,
					  MESSAGE, MESSAGE, KICK,		KICK,	  HOST,	 HOST,	CONFIG,	 RECORD_KINDS};
	struct record record = {
		.kind = kinds[draw(16)],
		.queue = (uint8_t)draw(queue_count),
		.index = (uint8_t)draw(draw(2) ? 4 : 64),
		.flags = (uint8_t)draw(256),
		.size = draw(2) ? draw(256) : draw(UINT32_MAX),
		.gpa = draw(2) ? draw(draw(2) ? 0x10 : 0x4000) : (uint64_t)draw(UINT32_MAX) << 32 | draw(UINT32_MAX),
	};

	if (record.kind == RECORD_KINDS)
		record.kind = (uint8_t)draw(RECORD_KINDS);
	memcpy(to, &record, RECORD);
}

static size_t mutate_once(uint8_t *data, size_t count, size_t max)
{
	size_t from = draw((uint32_t)count), to = draw((uint32_t)count);
	uint8_t kept[RECORD];

	switch (draw(9)) {
	case 0:
	case 1:
	case 2: /* insert; never before the setup */
		if (count == max)
			return count;
		memmove(data + RECORD * (from + 2), data + RECORD * (from + 1), RECORD * (count - from - 1));
		draw_record(data + RECORD * (from + 1));
		return count + 1;
	case 3: /* repeat */
		if (count == max || from == 0)
			return count;
		memcpy(kept, data + RECORD * from, RECORD);
		memmove(data + RECORD * (to + 2), data + RECORD * (to + 1), RECORD * (count - to - 1));
		memcpy(data + RECORD * (to + 1), kept, RECORD);
		return count + 1;
	case 4: /* remove */
		if (from == 0 || count < 2)
			return count;
		memmove(data + RECORD * from, data + RECORD * (from + 1), RECORD * (count - from - 1));
		return count - 1;
	case 5: /* swap */
		if (from == 0 || to == 0)
			return count;
		memcpy(kept, data + RECORD * from, RECORD);
		memmove(data + RECORD * from, data + RECORD * to, RECORD);
		memcpy(data + RECORD * to, kept, RECORD);
		return count;
	case 6: /* one byte */
		data[RECORD * from + draw(RECORD)] = (uint8_t)draw(256);
		return count;
	case 7: /* draw anew */
		if (from)
			draw_record(data + RECORD * from);
		return count;
	default:
		LLVMFuzzerMutate(data + RECORD * from, RECORD, RECORD);
		return count;
	}
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed)
{
	size_t count = size / RECORD, max = max_size / RECORD;

	draw_state = seed * UINT64_C(0x9e3779b97f4a7c15) | 1;
	if (max == 0)
		return size;
	if (count == 0) {
		memset(data, 0, RECORD);
		count = 1;
	}
	for (uint32_t times = 1 + draw(4); times > 0; times--)
		count = mutate_once(data, count, max);
	return RECORD * count;
}
