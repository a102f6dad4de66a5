#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"

static int report_fd;
static struct rlimit files; /* what a command may open: as many as the agent was given */

/* Let the agent open (count) descriptors, which poll wants to wait for as many, too; how many it may then. Once. */
size_t files_allow(size_t count)
{
    struct rlimit raised;

    if (getrlimit(RLIMIT_NOFILE, &files) != 0)
        return 0;
    if (files.rlim_cur >= count)
        return count;
    raised.rlim_cur = count;
    raised.rlim_max = files.rlim_max > count ? files.rlim_max : count;
    if (setrlimit(RLIMIT_NOFILE, &raised) == 0)
        return count;
    raised.rlim_cur = raised.rlim_max = files.rlim_max; /* only root may go beyond */
    return setrlimit(RLIMIT_NOFILE, &raised) == 0 ? files.rlim_max : files.rlim_cur;
}

static void fail(enum exec_stage stage, int error)
{
    struct child_failure failure = {.stage = stage, .error = (uint32_t)error};

    /* if the parent is gone nobody is left to tell */
    ssize_t ignored __attribute__((unused)) = write(report_fd, &failure, sizeof(failure));
    _exit(127);
}

static void reset_signals(void)
{
    sigset_t none;

    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_DFL); /* fails for SIGKILL and SIGSTOP, which have nothing to reset */
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

static void set_terminal(const struct child_setup *setup)
{
    if (setsid() < 0)
        fail(STAGE_SETUP, errno);
    if (setup->tty && ioctl(setup->stdin_fd, TIOCSCTTY, 0) != 0)
        fail(STAGE_SETUP, errno);
}

/* The three may be any fds, also 0, 1 or 2 themselves: lift them above before they are put in place. */
static void set_streams(struct child_setup setup)
{
    int *fds[3] = {&setup.stdin_fd, &setup.stdout_fd, &setup.stderr_fd};

    report_fd = fcntl(setup.status_fd, F_DUPFD_CLOEXEC, 3);
    if (report_fd < 0)
        _exit(127);
    for (int target = 0; target < 3; target++) {
        *fds[target] = fcntl(*fds[target], F_DUPFD_CLOEXEC, 3);
        if (*fds[target] < 0)
            fail(STAGE_SETUP, errno);
    }
    for (int target = 0; target < 3; target++) {
        if (dup2(*fds[target], target) < 0)
            fail(STAGE_SETUP, errno);
    }
}

/* All of ours are close-on-exec; this is for what the agent itself may have inherited. */
static void close_rest(void)
{
    if (dup2(report_fd, 3) < 0 || fcntl(3, F_SETFD, FD_CLOEXEC) < 0)
        fail(STAGE_SETUP, errno);
    report_fd = 3;
    syscall(SYS_close_range, 4u, ~0u, 0u); /* before Linux 5.9: close-on-exec has to do */
}

static void set_oom_score(void)
{
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);

    if (fd < 0)
        return; /* no /proc: the agent could not lower its own score either */
    ssize_t ignored __attribute__((unused)) = write(fd, "0", 1);
    close(fd);
}

static void set_user(const struct user *user, bool tty)
{
    if (geteuid() != 0 && user->uid == geteuid())
        return; /* an unprivileged agent under test runs commands as itself */
    if (tty && user->uid != 0 && fchown(STDIN_FILENO, user->uid, (gid_t)-1) != 0)
        fail(STAGE_USER, errno);
    if (setgroups(user->group_count, user->groups) != 0 || setgid(user->gid) != 0 || setuid(user->uid) != 0)
        fail(STAGE_USER, errno);
}

static void add_variable(struct exec_request *request, const char *name, const char *value)
{
    char *variable;

    if (value[0] == '\0' || exec_request_env(request, name) != NULL)
        return;
    if (asprintf(&variable, "%s=%s", name, value) < 0)
        fail(STAGE_SETUP, ENOMEM);
    request->envp[request->env_count++] = variable;
}

/* Like execvpe, but with the PATH of the command's own environment, no built-in shell for files without "#!", and
 * the error of the first file that was there, if one was. */
static int exec_along_path(struct exec_request *request)
{
    const char *name = request->argv[0], *path = exec_request_env(request, "PATH");
    char file[4096];
    int error = ENOENT;

    if (strchr(name, '/') != NULL) {
        execve(name, request->argv, request->envp);
        return errno;
    }
    while (path != NULL && name[0] != '\0') {
        size_t length = strcspn(path, ":");

        if (length + strlen(name) + 2 <= sizeof(file)) {
            snprintf(file, sizeof(file), "%.*s%s%s", (int)length, path, length > 0 ? "/" : "", name);
            execve(file, request->argv, request->envp);
            if (errno != ENOENT && errno != ENOTDIR && error == ENOENT)
                error = errno;
        }
        path = path[length] == ':' ? path + length + 1 : NULL;
    }
    return error;
}

/* ENOENT of exec also says that the interpreter is missing; the caller tells the two apart by the file. */
void child_exec(struct exec_request *request, const struct child_setup *setup, const char *default_path)
{
    struct user user;

    report_fd = setup->status_fd;
    reset_signals();
    set_terminal(setup);
    set_streams(*setup);
    close_rest();
    if (setrlimit(RLIMIT_NOFILE, &files) != 0)
        fail(STAGE_SETUP, errno);
    set_oom_score();
    umask(022);
    bool is_self = request->user[0] == '\0' && geteuid() != 0;
    char own_uid[16];

    snprintf(own_uid, sizeof(own_uid), "%u", geteuid());
    int error = user_resolve(is_self ? own_uid : request->user, &user);

    if (error != 0)
        fail(STAGE_USER, error);
    set_user(&user, setup->tty);
    if (chdir(request->cwd[0] == '\0' ? "/" : request->cwd) != 0)
        fail(STAGE_CWD, errno);
    add_variable(request, "PATH", default_path);
    add_variable(request, "HOME", user.home);
    add_variable(request, "USER", user.name);
    add_variable(request, "LOGNAME", user.name);
    fail(STAGE_EXEC, exec_along_path(request));
    _exit(127);
}
