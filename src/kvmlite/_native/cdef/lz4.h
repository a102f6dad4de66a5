int64_t kvl_lz4_decode_block(const uint8_t *from, uint64_t from_size, uint8_t *to, uint64_t to_size);
