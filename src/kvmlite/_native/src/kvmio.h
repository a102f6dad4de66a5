/*
 * What Python needs of the KVM interface and the standard library cannot give: ioctls with full-width arguments,
 * and GSI routing entries, whose target lies in a union that cffi cannot leave open.
 */
#ifndef KVL_KVMIO_H
#define KVL_KVMIO_H

#include <linux/kvm.h>
#include <stdint.h>

/* ioctl(2) with a number or a pointer: its result, or -errno. Any thread. */
int kvl_ioctl_value(int fd, unsigned long request, unsigned long value);
int kvl_ioctl_pointer(int fd, unsigned long request, void *argument);

void kvl_route_irqchip(struct kvm_irq_routing_entry *entry, uint32_t gsi, uint32_t irqchip, uint32_t pin);
void kvl_route_msi(struct kvm_irq_routing_entry *entry, uint32_t gsi, uint64_t address, uint32_t data);

#endif
