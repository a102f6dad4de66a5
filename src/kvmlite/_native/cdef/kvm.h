/* Structures of <linux/kvm.h>: the compiler fills in offsets and sizes. */
struct kvm_run { ...; };

struct kvm_userspace_memory_region {
	uint32_t slot;
	uint32_t flags;
	uint64_t guest_phys_addr;
	uint64_t memory_size;
	uint64_t userspace_addr;
	...;
};

struct kvm_regs {
	uint64_t rax, rbx, rcx, rdx;
	uint64_t rsi, rdi, rsp, rbp;
	uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
	uint64_t rip, rflags;
	...;
};

struct kvm_segment {
	uint64_t base;
	uint32_t limit;
	uint16_t selector;
	uint8_t type;
	uint8_t present, dpl, db, s, l, g, avl;
	uint8_t unusable;
	...;
};

struct kvm_dtable {
	uint64_t base;
	uint16_t limit;
	...;
};

struct kvm_sregs {
	struct kvm_segment cs, ds, es, fs, gs, ss, tr, ldt;
	struct kvm_dtable gdt, idt;
	uint64_t cr0, cr2, cr3, cr4, cr8;
	uint64_t efer;
	uint64_t apic_base;
	...;
};

struct kvm_cpuid_entry2 {
	uint32_t function;
	uint32_t index;
	uint32_t flags;
	uint32_t eax, ebx, ecx, edx;
	...;
};

struct kvm_cpuid2 {
	uint32_t nent;
	struct kvm_cpuid_entry2 entries[];
	...;
};

struct kvm_msr_entry {
	uint32_t index;
	uint64_t data;
	...;
};

struct kvm_msrs {
	uint32_t nmsrs;
	struct kvm_msr_entry entries[];
	...;
};

struct kvm_mp_state {
	uint32_t mp_state;
	...;
};

struct kvm_pit_config {
	uint32_t flags;
	...;
};

struct kvm_irqfd {
	uint32_t fd;
	uint32_t gsi;
	uint32_t flags;
	uint32_t resamplefd;
	...;
};

struct kvm_coalesced_mmio_zone {
	uint64_t addr;
	uint32_t size;
	...;
};

struct kvm_ioeventfd {
	uint64_t datamatch;
	uint64_t addr;
	uint32_t len;
	int32_t fd;
	uint32_t flags;
	...;
};

struct kvm_irq_level {
	uint32_t irq;
	uint32_t level;
	...;
};

/* Its union is written by kvl_route_irqchip() and kvl_route_msi(). */
struct kvm_irq_routing_entry {
	uint32_t gsi;
	uint32_t type;
	uint32_t flags;
	...;
};

struct kvm_irq_routing {
	uint32_t nr;
	uint32_t flags;
	struct kvm_irq_routing_entry entries[];
	...;
};

struct kvm_enable_cap {
	uint32_t cap;
	uint32_t flags;
	unsigned long long args[4];
	...;
};

int kvl_ioctl_value(int fd, unsigned long request, unsigned long value);
int kvl_ioctl_pointer(int fd, unsigned long request, void *argument);
void kvl_route_irqchip(struct kvm_irq_routing_entry *entry, uint32_t gsi, uint32_t irqchip, uint32_t pin);
void kvl_route_msi(struct kvm_irq_routing_entry *entry, uint32_t gsi, uint64_t address, uint32_t data);
