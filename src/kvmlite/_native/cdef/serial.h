struct kvl_serial {
	uint64_t out_total;
	uint64_t dropped;
	...;
};

#define KVL_SERIAL_OUT_SIZE ...
#define KVL_SERIAL_IN_SIZE ...

int kvl_serial_init(struct kvl_serial *serial, int irq_eventfd, int notify_eventfd);
void kvl_serial_deinit(struct kvl_serial *serial);
uint8_t kvl_serial_read(struct kvl_serial *serial, unsigned offset);
void kvl_serial_write(struct kvl_serial *serial, unsigned offset, uint8_t value);
uint32_t kvl_serial_room(struct kvl_serial *serial);
uint32_t kvl_serial_take_output(struct kvl_serial *serial, uint8_t *to, uint32_t size);
uint32_t kvl_serial_put_input(struct kvl_serial *serial, const uint8_t *from, uint32_t size);
