#include "serial.h"

#include <linux/serial_reg.h>
#include <string.h>
#include <unistd.h>

static void signal_eventfd(int fd)
{
	const uint64_t one = 1;

	/* Cannot fail in a way that matters: a full counter means the signal is already pending. */
	if (write(fd, &one, sizeof(one)) < 0)
		return;
}

static bool input_ready(const struct kvl_serial *serial)
{
	return serial->in_head != serial->in_tail;
}

/* Recompute the line; a rise is an edge for the IOAPIC. */
static void update_line(struct kvl_serial *serial)
{
	bool line = ((serial->ier & UART_IER_RDI) && input_ready(serial)) ||
		    ((serial->ier & UART_IER_THRI) && serial->thr_pending);

	if (line && !serial->line)
		signal_eventfd(serial->irq_eventfd);
	serial->line = line;
}

int kvl_serial_init(struct kvl_serial *serial, int irq_eventfd, int notify_eventfd)
{
	memset(serial, 0, sizeof(*serial));
	serial->irq_eventfd = irq_eventfd;
	serial->notify_eventfd = notify_eventfd;
	serial->dll = 1; /* 115200 baud */
	serial->lcr = UART_LCR_WLEN8;
	return pthread_mutex_init(&serial->lock, NULL);
}

void kvl_serial_deinit(struct kvl_serial *serial)
{
	pthread_mutex_destroy(&serial->lock);
}

static uint8_t read_identification(struct kvl_serial *serial)
{
	uint8_t fifo = (serial->fcr & UART_FCR_ENABLE_FIFO) ? 0xc0 : 0;

	if ((serial->ier & UART_IER_RDI) && input_ready(serial))
		return fifo | UART_IIR_RDI;
	if ((serial->ier & UART_IER_THRI) && serial->thr_pending) {
		serial->thr_pending = false; /* reading the cause acknowledges it */
		return fifo | UART_IIR_THRI;
	}
	return fifo | UART_IIR_NO_INT;
}

static uint8_t read_modem_status(const struct kvl_serial *serial)
{
	uint8_t mcr = serial->mcr, msr = 0;

	if (!(mcr & UART_MCR_LOOP))
		return UART_MSR_DCD | UART_MSR_DSR | UART_MSR_CTS;
	/* Loopback ties the outputs to the inputs: how drivers tell a real port from a floating bus. */
	msr |= (mcr & UART_MCR_RTS) ? UART_MSR_CTS : 0;
	msr |= (mcr & UART_MCR_DTR) ? UART_MSR_DSR : 0;
	msr |= (mcr & UART_MCR_OUT1) ? UART_MSR_RI : 0;
	msr |= (mcr & UART_MCR_OUT2) ? UART_MSR_DCD : 0;
	return msr;
}

/* Once half of a queue that was full is free again, ask the host for what did not fit. */
static void ask_for_input(struct kvl_serial *serial)
{
	if (serial->input_wanted && serial->in_tail - serial->in_head <= KVL_SERIAL_IN_SIZE / 2) {
		serial->input_wanted = false;
		signal_eventfd(serial->notify_eventfd);
	}
}

static uint8_t take_input(struct kvl_serial *serial)
{
	uint8_t value;

	if (!input_ready(serial))
		return 0;
	value = serial->in[serial->in_head++ % KVL_SERIAL_IN_SIZE];
	ask_for_input(serial);
	return value;
}

static uint8_t read_register(struct kvl_serial *serial, unsigned offset)
{
	bool dlab = serial->lcr & UART_LCR_DLAB;

	switch (offset) {
	case UART_RX:
		return dlab ? serial->dll : take_input(serial);
	case UART_IER:
		return dlab ? serial->dlm : serial->ier;
	case UART_IIR:
		return read_identification(serial);
	case UART_LCR:
		return serial->lcr;
	case UART_MCR:
		return serial->mcr;
	case UART_LSR:
		return (uint8_t)(UART_LSR_TEMT | UART_LSR_THRE | (input_ready(serial) ? UART_LSR_DR : 0));
	case UART_MSR:
		return read_modem_status(serial);
	case UART_SCR:
		return serial->scr;
	default:
		return 0xff;
	}
}

uint8_t kvl_serial_read(struct kvl_serial *serial, unsigned offset)
{
	uint8_t value;

	pthread_mutex_lock(&serial->lock);
	value = read_register(serial, offset);
	update_line(serial);
	pthread_mutex_unlock(&serial->lock);
	return value;
}

static void transmit(struct kvl_serial *serial, uint8_t value)
{
	serial->thr_pending = true;
	if (serial->mcr & UART_MCR_LOOP) {
		if (serial->in_tail - serial->in_head < KVL_SERIAL_IN_SIZE)
			serial->in[serial->in_tail++ % KVL_SERIAL_IN_SIZE] = value;
		return;
	}
	if (serial->out_tail - serial->out_head == KVL_SERIAL_OUT_SIZE) {
		serial->dropped++;
		return;
	}
	if (serial->out_tail == serial->out_head)
		signal_eventfd(serial->notify_eventfd);
	serial->out[serial->out_tail++ % KVL_SERIAL_OUT_SIZE] = value;
	serial->out_total++;
}

static void write_register(struct kvl_serial *serial, unsigned offset, uint8_t value)
{
	bool dlab = serial->lcr & UART_LCR_DLAB;

	switch (offset) {
	case UART_TX:
		if (dlab)
			serial->dll = value;
		else
			transmit(serial, value);
		break;
	case UART_IER:
		if (dlab) {
			serial->dlm = value;
			break;
		}
		if ((value & UART_IER_THRI) && !(serial->ier & UART_IER_THRI))
			serial->thr_pending = true; /* the transmitter is always empty */
		serial->ier = value & 0x0f;
		break;
	case UART_FCR:
		serial->fcr = value;
		if (value & UART_FCR_CLEAR_RCVR) {
			serial->in_head = serial->in_tail;
			ask_for_input(serial);
		}
		break;
	case UART_LCR:
		serial->lcr = value;
		break;
	case UART_MCR:
		serial->mcr = value & 0x1f;
		break;
	case UART_SCR:
		serial->scr = value;
		break;
	default:
		break;
	}
}

void kvl_serial_write(struct kvl_serial *serial, unsigned offset, uint8_t value)
{
	pthread_mutex_lock(&serial->lock);
	write_register(serial, offset, value);
	update_line(serial);
	pthread_mutex_unlock(&serial->lock);
}

uint32_t kvl_serial_room(struct kvl_serial *serial)
{
	uint32_t room;

	pthread_mutex_lock(&serial->lock);
	room = KVL_SERIAL_OUT_SIZE - (serial->out_tail - serial->out_head);
	pthread_mutex_unlock(&serial->lock);
	return room;
}

uint32_t kvl_serial_take_output(struct kvl_serial *serial, uint8_t *to, uint32_t size)
{
	uint32_t count = 0;

	pthread_mutex_lock(&serial->lock);
	while (count < size && serial->out_head != serial->out_tail)
		to[count++] = serial->out[serial->out_head++ % KVL_SERIAL_OUT_SIZE];
	pthread_mutex_unlock(&serial->lock);
	return count;
}

uint32_t kvl_serial_put_input(struct kvl_serial *serial, const uint8_t *from, uint32_t size)
{
	uint32_t count = 0;

	pthread_mutex_lock(&serial->lock);
	while (count < size && serial->in_tail - serial->in_head < KVL_SERIAL_IN_SIZE)
		serial->in[serial->in_tail++ % KVL_SERIAL_IN_SIZE] = from[count++];
	serial->input_wanted = count < size;
	update_line(serial);
	pthread_mutex_unlock(&serial->lock);
	return count;
}
