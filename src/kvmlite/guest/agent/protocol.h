/* Wire format between the agent and the host, protocol version 1. The table is in docs/agent.md; the host's half is
 * kvmlite/guest/protocol.py, and a test compares the two.
 *
 * A frame is a header of 12 bytes, little-endian, and its payload:
 *   0 le32 size of the payload (at most 65536) / 4 u8 type / 5 u8 flags / 6 le16 zero / 8 le32 id
 */
#ifndef KVMLITE_AGENT_PROTOCOL_H
#define KVMLITE_AGENT_PROTOCOL_H

enum {
    PROTOCOL_VERSION = 1,
    PROTOCOL_HEADER_SIZE = 12,
    PROTOCOL_PAYLOAD_MAX = 65536,
    PROTOCOL_DATA_CHUNK = 61440,        /* stream data per frame the agent sends: 15 pages, whole with its header in 64 KiB */
    PROTOCOL_EXEC_MAX = 1024 * 1024,    /* an EXEC may span frames, up to this */
    PROTOCOL_STDIN_WINDOW = 256 * 1024, /* bytes of standard input the agent will hold per command */
    PROTOCOL_EXECS_MAX = 256,           /* commands at once */
};
#define PROTOCOL_MAGIC "KVLA"

enum message_type {
    MESSAGE_HELLO = 1,
    MESSAGE_EXEC = 2,
    MESSAGE_STARTED = 3,
    MESSAGE_EXEC_FAILED = 4,
    MESSAGE_STDIN = 5,
    MESSAGE_STDOUT = 6,
    MESSAGE_STDERR = 7,
    MESSAGE_WINDOW = 8,
    MESSAGE_CLOSE = 9,
    MESSAGE_SIGNAL = 10,
    MESSAGE_WINSIZE = 11,
    MESSAGE_EXIT = 12,
    MESSAGE_PING = 13,
    MESSAGE_PONG = 14,
    MESSAGE_CLOCK_SET = 15,
    MESSAGE_ENTROPY = 16,
    MESSAGE_MOUNT = 17,
    MESSAGE_SHUTDOWN = 18,
    MESSAGE_RESULT = 19,
    MESSAGE_ERROR = 20,
    MESSAGE_ROOT = 21,
    MESSAGE_SYNC = 22,
    MESSAGE_NETWORK = 23,
    MESSAGE_MKDIR = 24,
};

enum frame_flag {
    FLAG_EOF = 1,  /* STDIN, STDOUT, STDERR: the stream ends after this payload */
    FLAG_MORE = 2, /* EXEC: continued in the next EXEC frame of the same id */
};

enum stream {
    STREAM_STDIN = 0,
    STREAM_STDOUT = 1,
    STREAM_STDERR = 2,
};

enum exec_flag {
    EXEC_TTY = 1,   /* a terminal is 0, 1 and 2; STDERR is not used */
    EXEC_STDIN = 2, /* a pipe is standard input; else /dev/null */
    EXEC_MERGE = 4, /* standard error goes where standard output goes */
};

enum exec_stage {
    STAGE_REQUEST = 1, /* the request itself: malformed, too many commands */
    STAGE_SETUP = 2,   /* pipes, pty, fork */
    STAGE_USER = 3,
    STAGE_CWD = 4,
    STAGE_EXEC = 5,
};

enum exit_kind {
    EXIT_CODE = 0,
    EXIT_SIGNAL = 1,
};

enum channel_kind {
    CHANNEL_AUTO = 0,
    CHANNEL_VSOCK = 1,
    CHANNEL_CONSOLE = 2,
    CHANNEL_SERIAL = 3,
    CHANNEL_FD = 4,
};

enum shutdown_kind {
    SHUTDOWN_POWEROFF = 0,
    SHUTDOWN_REBOOT = 1,
    SHUTDOWN_HALT = 2,
};

#endif
