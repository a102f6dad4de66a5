/* The agent's network set-up as a program of its own: the payload of NETWORK on standard input, the errno as status. */
#include <unistd.h>

#include "agent.h"

int main(void)
{
    static uint8_t payload[PROTOCOL_PAYLOAD_MAX];
    ssize_t size = read(STDIN_FILENO, payload, sizeof(payload));

    return size < 0 ? 255 : network_configure(payload, (size_t)size);
}
