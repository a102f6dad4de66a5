#define KVL_WORKER_STOPPED ...
#define KVL_WORKER_QUEUE_FAULT ...
#define KVL_WORKER_MAX_SOURCES ...

struct pollfd {
	int fd;
	short events;
	...;
};

struct kvl_worker {
	struct pollfd fds[...];
	uint32_t count;
	uint32_t returned_source;
	uint64_t spin_max_ns;
	uint64_t handled;
	uint64_t sleeps;
	...;
};

void kvl_worker_init(struct kvl_worker *worker, int stop_fd, uint64_t spin_max_ns);
void kvl_worker_clear(struct kvl_worker *worker);
bool kvl_worker_is_waiting(const struct kvl_worker *worker);
int kvl_worker_run(struct kvl_worker *worker);
