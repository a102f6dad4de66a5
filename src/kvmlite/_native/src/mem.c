#define _GNU_SOURCE
#include "mem.h"

#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>

enum { GUARD = 4096, ALIGN = 2 << 20 };

void *kvl_mem_at(const struct kvl_mem *mem, uint64_t gpa, uint64_t size)
{
	for (uint32_t i = 0; i < mem->count; i++) {
		const struct kvl_region *region = &mem->regions[i];

		/* Differences, not sums: gpa + size may wrap. */
		if (gpa < region->gpa || gpa - region->gpa >= region->size)
			continue;
		if (size > region->size - (gpa - region->gpa))
			return NULL;
		return region->hva + (gpa - region->gpa);
	}
	return NULL;
}

int kvl_mem_read(const struct kvl_mem *mem, uint64_t gpa, void *to, uint64_t size)
{
	const void *from = kvl_mem_at(mem, gpa, size);

	if (!from)
		return -1;
	memcpy(to, from, size);
	return 0;
}

int kvl_mem_write(const struct kvl_mem *mem, uint64_t gpa, const void *from, uint64_t size)
{
	void *to = kvl_mem_at(mem, gpa, size);

	if (!to)
		return -1;
	memcpy(to, from, size);
	return 0;
}

uint8_t *kvl_mem_map(uint64_t size, int fd, uint64_t offset, bool shared)
{
	uint64_t reserve = size + ALIGN + 2 * GUARD;
	int flags = MAP_FIXED | (fd < 0 ? MAP_ANONYMOUS : 0) | (shared ? MAP_SHARED : MAP_PRIVATE | MAP_NORESERVE);
	uint8_t *base, *hva;
	uint64_t head;
	int saved;

	/* One reservation, then the RAM over its aligned middle: what is left on both sides stays without access. */
	base = mmap(NULL, reserve, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (base == MAP_FAILED)
		return NULL;
	hva = (uint8_t *)(((uintptr_t)base + GUARD + ALIGN - 1) & ~(uintptr_t)(ALIGN - 1));
	if (mmap(hva, size, PROT_READ | PROT_WRITE, flags, fd, (off_t)offset) == MAP_FAILED) {
		saved = errno;
		munmap(base, reserve);
		errno = saved;
		return NULL;
	}
	/* Keep exactly one guard page each side, so that kvl_mem_unmap() knows what to give back. */
	head = (uint64_t)(hva - base) - GUARD;
	if (head)
		munmap(base, head);
	munmap(hva + size + GUARD, reserve - head - size - 2 * GUARD);
	return hva;
}

uint8_t *kvl_mem_map_file(uint64_t size, int fd, uint64_t file_size, bool shared, bool writable)
{
	int access = PROT_READ | (writable ? PROT_WRITE : 0);
	int flags = MAP_FIXED | (shared ? MAP_SHARED : MAP_PRIVATE | MAP_NORESERVE);
	uint8_t *hva = kvl_mem_map(size, -1, 0, false);
	int saved;

	if (!hva)
		return NULL;
	if (mmap(hva, file_size, access, flags, fd, 0) == MAP_FAILED) {
		saved = errno;
		kvl_mem_unmap(hva, size);
		errno = saved;
		return NULL;
	}
	return hva;
}

int kvl_mem_unmap(uint8_t *hva, uint64_t size)
{
	return munmap(hva - GUARD, size + 2 * GUARD);
}

int kvl_mem_advise_huge(uint8_t *hva, uint64_t size)
{
	return madvise(hva, size, MADV_HUGEPAGE);
}

int kvl_mem_discard(uint8_t *hva, uint64_t size, int fd, uint64_t offset)
{
	if (fd < 0)
		return madvise(hva, size, MADV_DONTNEED);
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size);
}
