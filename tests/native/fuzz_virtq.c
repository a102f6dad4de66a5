/*
 * Fuzzes the virtqueue walker with rings a hostile driver might write.
 *
 * Under libFuzzer (-DKVL_LIBFUZZER) the input is a driver's memory and steps. Without it, main(seed, cases) makes
 * plausible rings, breaks them here and there, and reports which faults it met; main(seed, cases, "race") lets a
 * thread scribble over them meanwhile. Any pointer outside guest RAM aborts.
 */
#include "rings.h"

enum { CODES = 17, STEPS = 96 };

static uint64_t chains, faults[CODES];

static void check_chain(const struct kvl_virtq *q, const struct kvl_chain *chain)
{
	uint64_t readable = 0, writable = 0;
	uint32_t count = (uint32_t)chain->readable_count + chain->writable_count;
	uint8_t flat[512];

	require(chain->head < q->size, "head outside the queue");
	require(count <= q->size, "more iovecs than descriptors");
	for (uint32_t i = 0; i < count; i++) {
		const struct iovec *iov = &chain->iov[i];

		require(iov->iov_len > 0, "empty iovec");
		require(is_guest_ram(iov->iov_base, iov->iov_len), "iovec outside guest RAM");
		if (i < chain->readable_count)
			readable += iov->iov_len;
		else
			writable += iov->iov_len;
	}
	require(readable == chain->readable_size && writable == chain->writable_size, "sizes do not add up");
	require(readable + writable <= UINT64_C(1) << 32, "chain larger than 4 GiB");
	for (uint64_t offset = 0; offset < readable + 1; offset += 4093)
		require(kvl_iov_read(chain->iov, chain->readable_count, offset, flat, sizeof(flat)) ==
				(readable - offset < sizeof(flat) ? readable - offset : sizeof(flat)),
			"read another number of bytes");
	memset(flat, 0xa5, sizeof(flat));
	if (writable)
		require(kvl_iov_write(chain->iov + chain->readable_count, chain->writable_count, writable - 1, flat, 2) == 1,
			"wrote beyond the chain");
}

/* One life of a queue. Each step byte: pop; or change a byte of RAM, push, ask for interrupts, toggle notifications. */
static void live(const struct kvl_virtq_layout *layout, const uint8_t *steps, size_t count)
{
	static struct iovec iov[MAX_SIZE + 1];
	struct kvl_chain chain = {.iov = iov};
	struct kvl_virtq q;
	uint16_t popped[MAX_SIZE];
	uint32_t in_flight = 0;
	int code = kvl_virtq_init(&q, &mem, layout);

	if (code) {
		require(code == kvl_virtq_pop(&q, &chain), "a broken queue yields something else");
		faults[-code]++;
		return;
	}
	for (size_t i = 0; i < count; i++) {
		iov[q.size].iov_len = 0xdead;
		code = kvl_virtq_pop(&q, &chain);
		require(iov[q.size].iov_len == 0xdead, "wrote behind the iovecs");
		if (code < 0) {
			require(-code < CODES && strcmp(kvl_error_text(code), "unknown error") != 0, "fault without a text");
			require(code == kvl_virtq_pop(&q, &chain), "a fault does not stay");
			faults[-code]++;
			return;
		}
		if (code == 1) {
			chains++;
			check_chain(&q, &chain);
			require(in_flight < q.size, "more chains in flight than descriptors");
			popped[in_flight++] = chain.head;
		}
		if (steps[i] & 1 && in_flight)
			kvl_virtq_push(&q, popped[--in_flight], steps[i]);
		if (steps[i] & 2)
			kvl_virtq_needs_interrupt(&q);
		if (steps[i] & 4)
			kvl_virtq_disable_notify(&q);
		if (steps[i] & 8)
			kvl_virtq_enable_notify(&q);
		if (steps[i] & 16 && i + 1 < count) /* the driver goes on */
			rings_advance(steps[i + 1] % 4);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct rings_input input;

	if (rings_take_input(data, size, 0, STEPS, &input))
		live(&input.layout, input.steps, input.count);
	return 0;
}

#ifndef KVL_LIBFUZZER

static void one_case(void)
{
	struct kvl_virtq_layout layout = rings_draw();
	uint8_t steps[STEPS];

	for (unsigned i = 0; i < sizeof(steps); i++)
		steps[i] = (uint8_t)draw(256);
	live(&layout, steps, sizeof(steps));
}

int main(int argc, char **argv)
{
	struct rings_run run;

	rings_run_begin(&run, argc, argv);
	while (rings_run_next(&run, chains))
		one_case();
	rings_run_end(&run);
	printf("chains %llu\n", (unsigned long long)chains);
	for (int code = 1; code < CODES; code++)
		printf("fault %d %llu %s\n", -code, (unsigned long long)faults[code], kvl_error_text(-code));
	return 0;
}
#endif
