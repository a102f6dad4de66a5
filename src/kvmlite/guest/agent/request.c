#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "agent.h"

/* Payload of EXEC: 0 le32 stdout window / 4 le32 stderr window / 8 le32 flags / 12 le16 columns / 14 le16 rows /
 * 16 le32 argument count / 20 le32 environment count / 24 NUL-terminated strings: user, cwd, arguments, environment. */
struct exec_head {
    uint32_t stdout_window, stderr_window, flags;
    uint16_t columns, rows;
    uint32_t argument_count, env_count;
};
_Static_assert(sizeof(struct exec_head) == 24, "the head has no padding");

static size_t count_strings(const char *text, size_t size)
{
    size_t count = 0;

    for (size_t offset = 0; offset < size; offset++)
        count += text[offset] == '\0';
    return count;
}

static char *take_string(char **cursor)
{
    char *string = *cursor;

    *cursor += strlen(string) + 1;
    return string;
}

int exec_request_init(struct exec_request *request, const uint8_t *payload, size_t size)
{
    struct exec_head head;

    *request = (struct exec_request){0};
    if (size <= sizeof(head) || payload[size - 1] != '\0')
        return EBADMSG;
    memcpy(&head, payload, sizeof(head));
    uint64_t argument_count = le32toh(head.argument_count), env_count = le32toh(head.env_count);
    size_t text_size = size - sizeof(head);

    if (argument_count == 0 || count_strings((const char *)payload + sizeof(head), text_size) != 2 + argument_count + env_count)
        return EBADMSG;
    size_t pointer_count = argument_count + 1 + env_count + REQUEST_ENV_EXTRA + 1;

    request->memory = malloc(text_size);
    request->argv = calloc(pointer_count, sizeof(char *));
    if (request->memory == NULL || request->argv == NULL) {
        exec_request_deinit(request);
        return ENOMEM;
    }
    char *cursor = memcpy(request->memory, payload + sizeof(head), text_size);

    request->stdout_window = le32toh(head.stdout_window);
    request->stderr_window = le32toh(head.stderr_window);
    request->flags = le32toh(head.flags);
    request->columns = le16toh(head.columns);
    request->rows = le16toh(head.rows);
    request->user = take_string(&cursor);
    request->cwd = take_string(&cursor);
    for (size_t index = 0; index < argument_count; index++)
        request->argv[index] = take_string(&cursor);
    request->envp = request->argv + argument_count + 1;
    request->env_count = env_count;
    for (size_t index = 0; index < env_count; index++)
        request->envp[index] = take_string(&cursor);
    return 0;
}

void exec_request_deinit(struct exec_request *request)
{
    free(request->memory);
    free(request->argv);
    request->memory = NULL;
    request->argv = NULL;
}

const char *exec_request_env(const struct exec_request *request, const char *name)
{
    size_t length = strlen(name);

    for (size_t index = 0; index < request->env_count; index++) {
        if (strncmp(request->envp[index], name, length) == 0 && request->envp[index][length] == '=')
            return request->envp[index] + length + 1;
    }
    return NULL;
}
