struct kvl_ledger {
	uint16_t avail_idx;
	uint16_t used_idx;
	bool is_lost;
	...;
};

void kvl_ledger_init(struct kvl_ledger *ledger, const struct kvl_virtq *queue, uint8_t *open, uint16_t idx, int call_fd,
		     int irq_fd);
void kvl_ledger_update(struct kvl_ledger *ledger);
int kvl_ledger_add_to_worker(struct kvl_ledger *ledger, struct kvl_worker *worker);
