struct kvl_region {
	uint64_t gpa;
	uint64_t size;
	uint8_t *hva;
	...;
};

struct kvl_mem {
	uint32_t count;
	struct kvl_region regions[...];
	...;
};

#define KVL_MEM_MAX_REGIONS ...

void *kvl_mem_at(const struct kvl_mem *mem, uint64_t gpa, uint64_t size);
int kvl_mem_read(const struct kvl_mem *mem, uint64_t gpa, void *to, uint64_t size);
int kvl_mem_write(const struct kvl_mem *mem, uint64_t gpa, const void *from, uint64_t size);
uint8_t *kvl_mem_map(uint64_t size, int fd, uint64_t offset, bool shared);
uint8_t *kvl_mem_map_file(uint64_t size, int fd, uint64_t file_size, bool shared, bool writable);
int kvl_mem_unmap(uint8_t *hva, uint64_t size);
int kvl_mem_advise_huge(uint8_t *hva, uint64_t size);
int kvl_mem_discard(uint8_t *hva, uint64_t size, int fd, uint64_t offset);
