/*
 * Fuzzes the ledger of chains under way with the rings of a hostile driver, and of a back end that is no better.
 *
 * While both keep the rules, the ledger has to know exactly what is under way, however often it looks; whatever they
 * write, it stays within its array, and an empty queue makes it right again. Under libFuzzer (-DKVL_LIBFUZZER) the input
 * is their steps. Without it, main(seed, cases) draws them and prints how often the ledger was right and how often it
 * knew that it was not; main(seed, cases, "race") lets a thread scribble over the rings meanwhile.
 */
#include "ledger.h"
#include "rings.h"

enum { STEPS = 200 };

static uint64_t known, lost;

/* Rings as driver and back end have them, as long as they are honest. */
struct model {
	uint8_t open[MAX_SIZE];
	uint16_t avail_idx, used_idx, out;
	uint16_t offered, returned; /* since the ledger last looked */
	int is_honest;
};

static void put16(uint64_t gpa, uint16_t value)
{
	memcpy(mem.regions[0].hva + gpa, &value, sizeof(value)); /* little-endian hosts only */
}

static void offer_head(struct model *model, const struct kvl_virtq *q, uint32_t which)
{
	uint32_t size = q->size, head = which % size;

	if (model->out == size || model->offered == size)
		return;
	while (model->open[head])
		head = (head + 1) % size;
	model->open[head] = 1;
	model->out++;
	model->offered++;
	put16(AVAIL_GPA + 4 + 2 * (model->avail_idx % size), (uint16_t)head);
	put16(AVAIL_GPA + 2, ++model->avail_idx);
}

static void return_head(struct model *model, const struct kvl_virtq *q, uint32_t which)
{
	uint32_t size = q->size, head = which % size;

	if (model->out == 0 || model->returned == size)
		return;
	while (!model->open[head])
		head = (head + 1) % size;
	model->open[head] = 0;
	model->out--;
	model->returned++;
	put16(USED_GPA + 4 + 8 * (model->used_idx % size), (uint16_t)head);
	put16(USED_GPA + 4 + 8 * (model->used_idx % size) + 2, 0);
	put16(USED_GPA + 2, ++model->used_idx);
}

static void update(struct model *model, struct kvl_ledger *ledger, int races)
{
	uint32_t size = ledger->queue->size;

	kvl_ledger_update(ledger);
	model->offered = model->returned = 0;
	lost += ledger->is_lost;
	if (races)
		return;
	if (ledger->avail_idx == ledger->used_idx) {
		require(!ledger->is_lost, "lost, though the queue is empty");
		for (uint32_t head = 0; head < size; head++)
			require(ledger->open[head] == 0, "something is under way in an empty queue");
	}
	if (model->is_honest) {
		known++;
		require(!ledger->is_lost, "lost, though all kept the rules");
		require(memcmp(ledger->open, model->open, size) == 0, "knows other chains than are under way");
	}
}

/* A queue's life: two bytes each step. */
static void live(uint32_t size, uint16_t first, const uint8_t *steps, size_t count, int races)
{
	struct kvl_virtq_layout layout = {.desc_gpa = DESC_GPA, .avail_gpa = AVAIL_GPA, .used_gpa = USED_GPA, .size = size};
	struct model model = {.avail_idx = first, .used_idx = first, .is_honest = !races};
	struct kvl_ledger ledger;
	struct kvl_virtq q;
	uint8_t *open;

	put16(AVAIL_GPA + 2, first);
	put16(USED_GPA + 2, first);
	if (kvl_virtq_init(&q, &mem, &layout))
		return;
	open = malloc(size); /* exactly: the sanitizer sees what is beyond */
	require(open != NULL, "out of memory");
	kvl_ledger_init(&ledger, &q, open, first, -1, -1);
	for (size_t i = 0; i + 1 < count; i += 2) {
		switch (steps[i] % 8) {
		case 0:
		case 1:
		case 2:
			offer_head(&model, &q, steps[i + 1]);
			break;
		case 3:
		case 4:
			return_head(&model, &q, steps[i + 1]);
			break;
		case 5:
		case 6:
			update(&model, &ledger, races);
			break;
		default:
			if (steps[i] < 0xe0)
				break;
			model.is_honest = 0;
			mem.regions[0].hva[(steps[i] & 8 ? USED_GPA : AVAIL_GPA) + (steps[i] & 16 ? 2 : steps[i + 1])] =
				steps[i + 1];
		}
	}
	update(&model, &ledger, races);
	free(open);
}

#ifdef KVL_LIBFUZZER
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	if (mem.count == 0)
		rings_map();
	if (size < 3)
		return 0;
	rings_fill(data, 0);
	live(1u << (data[0] % 7), (uint16_t)(data[1] << 8 | data[2]), data + 3, size - 3 < STEPS ? size - 3 : STEPS, 0);
	return 0;
}
#else
int main(int argc, char **argv)
{
	struct rings_run run;

	rings_run_begin(&run, argc, argv);
	while (rings_run_next(&run, lost)) {
		uint8_t steps[STEPS];

		for (unsigned i = 0; i < sizeof(steps); i++)
			steps[i] = (uint8_t)draw(256);
		if (draw(2)) /* nobody breaks a rule */
			for (unsigned i = 0; i < sizeof(steps); i += 2)
				steps[i] &= 0x7f;
		if (!run.races)
			memset(mem.regions[0].hva, 0, RINGS_END);
		live(1u << draw(7), (uint16_t)(draw(4) ? draw(0x10000) : 0xffff - draw(8)), steps, sizeof(steps), run.races);
	}
	rings_run_end(&run);
	printf("%llu %llu\n", (unsigned long long)known, (unsigned long long)lost);
	return 0;
}
#endif
