#include <errno.h>
#include <grp.h>
#include <pwd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "agent.h"

/* fgetpwent and fgetgrent parse one file and never load NSS modules, so they are safe in a static program. */

static bool parse_number(const char *text, uint32_t *ret)
{
    char *end;

    if (text[0] < '0' || text[0] > '9')
        return false;
    errno = 0;
    unsigned long number = strtoul(text, &end, 10);

    if (errno != 0 || *end != '\0' || number >= UINT32_MAX) /* -1 means "no change" to setuid and friends */
        return false;
    *ret = (uint32_t)number;
    return true;
}

static void set_text(char *field, size_t size, const char *value)
{
    snprintf(field, size, "%s", value == NULL ? "" : value);
}

static bool find_passwd(const char *name, struct user *user)
{
    FILE *stream = fopen("/etc/passwd", "re");
    struct passwd *entry;
    bool found = false;

    if (stream == NULL)
        return false;
    while (!found && (entry = fgetpwent(stream)) != NULL) {
        found = name != NULL ? strcmp(entry->pw_name, name) == 0 : entry->pw_uid == user->uid;
        if (!found)
            continue;
        user->uid = entry->pw_uid;
        user->gid = entry->pw_gid;
        set_text(user->name, sizeof(user->name), entry->pw_name);
        set_text(user->home, sizeof(user->home), entry->pw_dir);
    }
    fclose(stream);
    return found;
}

static bool has_member(const struct group *entry, const char *name)
{
    for (char **member = entry->gr_mem; *member != NULL; member++) {
        if (strcmp(*member, name) == 0)
            return true;
    }
    return false;
}

static void find_supplementary(struct user *user)
{
    size_t capacity = sizeof(user->groups) / sizeof(user->groups[0]);
    FILE *stream = fopen("/etc/group", "re");
    struct group *entry;

    if (stream == NULL)
        return;
    while (user->group_count < capacity && (entry = fgetgrent(stream)) != NULL) {
        if (entry->gr_gid != user->gid && has_member(entry, user->name))
            user->groups[user->group_count++] = entry->gr_gid;
    }
    fclose(stream);
}

static bool find_group(const char *name, gid_t *ret)
{
    FILE *stream = fopen("/etc/group", "re");
    struct group *entry;
    bool found = false;

    if (stream == NULL)
        return false;
    while (!found && (entry = fgetgrent(stream)) != NULL) {
        found = strcmp(entry->gr_name, name) == 0;
        if (found)
            *ret = entry->gr_gid;
    }
    fclose(stream);
    return found;
}

/* A uid that /etc/passwd does not list is its own group, not root's. */
static int resolve_owner(const char *name, struct user *ret)
{
    if (parse_number(name, &ret->uid)) {
        if (!find_passwd(NULL, ret)) {
            ret->gid = ret->uid;
            set_text(ret->name, sizeof(ret->name), name);
            set_text(ret->home, sizeof(ret->home), ret->uid == 0 ? "/root" : "/");
        }
        return 0;
    }
    if (find_passwd(name, ret))
        return 0;
    if (strcmp(name, "root") != 0)
        return ENOENT;
    return resolve_owner("0", ret);
}

int user_resolve(const char *spec, struct user *ret)
{
    char name[sizeof(ret->name)];
    const char *group = strchr(spec, ':');
    size_t length = group == NULL ? strlen(spec) : (size_t)(group - spec);

    *ret = (struct user){0};
    if (length >= sizeof(name))
        return ENOENT;
    memcpy(name, spec, length);
    name[length] = '\0';
    int error = resolve_owner(length == 0 ? "root" : name, ret);

    if (error != 0)
        return error;
    if (group != NULL) /* as asked, and no groups besides */
        return parse_number(group + 1, &ret->gid) || find_group(group + 1, &ret->gid) ? 0 : ENOENT;
    find_supplementary(ret);
    return 0;
}
