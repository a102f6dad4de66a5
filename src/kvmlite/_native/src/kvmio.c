#include "kvmio.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

int kvl_ioctl_value(int fd, unsigned long request, unsigned long value)
{
	int result = ioctl(fd, request, value);

	return result < 0 ? -errno : result;
}

int kvl_ioctl_pointer(int fd, unsigned long request, void *argument)
{
	int result = ioctl(fd, request, argument);

	return result < 0 ? -errno : result;
}

void kvl_route_irqchip(struct kvm_irq_routing_entry *entry, uint32_t gsi, uint32_t irqchip, uint32_t pin)
{
	memset(entry, 0, sizeof(*entry));
	entry->gsi = gsi;
	entry->type = KVM_IRQ_ROUTING_IRQCHIP;
	entry->u.irqchip.irqchip = irqchip;
	entry->u.irqchip.pin = pin;
}

void kvl_route_msi(struct kvm_irq_routing_entry *entry, uint32_t gsi, uint64_t address, uint32_t data)
{
	memset(entry, 0, sizeof(*entry));
	entry->gsi = gsi;
	entry->type = KVM_IRQ_ROUTING_MSI;
	entry->u.msi.address_lo = (uint32_t)address;
	entry->u.msi.address_hi = (uint32_t)(address >> 32);
	entry->u.msi.data = data;
}
