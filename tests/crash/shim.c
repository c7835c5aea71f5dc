/* Preloaded before libc: numbers every call that touches paths beginning with a prefix, writes them down, and at one of
 * them kills the process or fails. Armed from Python by shim_arm. Single-threaded use of the output is assumed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NEVER, KILL_BEFORE, KILL_AFTER, FAIL_ONCE, FAIL_FROM_THEN_ON };
enum { MAX_FD = 4096, LONGEST = 1024 };

static char prefix[LONGEST];
static long number, chosen;
static int action, error, trace = -1, no_exchange;
static char *names[MAX_FD]; /* of open files that count */

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

/* exported to Python */
void shim_arm(const char *start, long at, int what, int code, const char *trace_to, int exchange_refused) {
  snprintf(prefix, sizeof prefix, "%s", start);
  chosen = at, action = what, error = code, number = 0, no_exchange = exchange_refused;
  trace = trace_to && *trace_to ? REAL(open)(trace_to, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND, 0600) : -1;
}

static int counts(const char *path) { return *prefix && path && !strncmp(path, prefix, strlen(prefix)); }

static const char *place(int at, const char *path, char *room) {
  if (!path) return NULL;
  if (*path == '/') return path;
  if (at < 0 || at >= MAX_FD || !names[at]) return path;
  snprintf(room, 2 * LONGEST, "%s/%s", names[at], path);
  return room;
}

/* 1: the call is to fail. Kills before the call; `torn` says that the caller kills after (half of) it. */
static int meet(const char *call, const char *path, const char *second, int may_fail, int *torn) {
  char line[4 * LONGEST];
  long mine = number++;
  *torn = 0;
  if (trace >= 0) {
    int length = snprintf(line, sizeof line, "%s\t%s\t%s\n", call, path, second ? second : "");
    if (REAL(write)(trace, line, length) < 0) abort();
  }
  if (mine == chosen && action == KILL_BEFORE) kill(getpid(), SIGKILL);
  if (mine == chosen && action == KILL_AFTER) *torn = 1;
  int fails = may_fail && ((mine == chosen && action == FAIL_ONCE) || (mine >= chosen && action == FAIL_FROM_THEN_ON));
  if (fails) errno = error;
  return fails;
}

static void after(int torn) {
  if (torn) kill(getpid(), SIGKILL);
}

static void opened(int fd, const char *path) {
  if (fd >= 0 && fd < MAX_FD) free(names[fd]), names[fd] = path ? strdup(path) : NULL;
}

static int any_open(int at, const char *given, int flags, mode_t mode) {
  char room[2 * LONGEST];
  const char *path = place(at, given, room);
  int torn = 0, writes = (flags & (O_CREAT | O_TRUNC)) || (flags & O_ACCMODE) != O_RDONLY;
  if (!counts(path)) return REAL(openat)(at, given, flags, mode);
  if (meet(writes ? "create" : "open", path, NULL, writes, &torn)) return -1;
  int fd = REAL(openat)(at, given, flags, mode);
  opened(fd, path);
  after(torn);
  return fd;
}

#define MODE(last) mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, last); mode = va_arg(a, mode_t); va_end(a); }
int open(const char *p, int flags, ...) { MODE(flags) return any_open(AT_FDCWD, p, flags, mode); }
int open64(const char *p, int flags, ...) { MODE(flags) return any_open(AT_FDCWD, p, flags | O_LARGEFILE, mode); }
int openat(int at, const char *p, int flags, ...) { MODE(flags) return any_open(at, p, flags, mode); }
int openat64(int at, const char *p, int flags, ...) { MODE(flags) return any_open(at, p, flags | O_LARGEFILE, mode); }

static const char *of(int fd) { return *prefix && fd >= 0 && fd < MAX_FD ? names[fd] : NULL; }

ssize_t write(int fd, const void *data, size_t size) {
  int torn;
  if (!of(fd)) return REAL(write)(fd, data, size);
  if (meet("write", of(fd), NULL, 1, &torn)) return -1;
  ssize_t done = REAL(write)(fd, data, torn ? size / 2 : size);
  after(torn);
  return done;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t where) {
  int torn;
  if (!of(fd)) return REAL(pwrite64)(fd, data, size, where);
  if (meet("write", of(fd), NULL, 1, &torn)) return -1;
  ssize_t done = REAL(pwrite64)(fd, data, torn ? size / 2 : size, where);
  after(torn);
  return done;
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t where) { return pwrite64(fd, data, size, where); }

#define ON_FILE(call, type, declared, given)                    \
  int call declared {                                           \
    int torn;                                                   \
    if (!of(fd)) return REAL(call) given;                       \
    if (meet(type, of(fd), NULL, 1, &torn)) return -1;          \
    int result = REAL(call) given;                              \
    after(torn);                                                \
    return result;                                              \
  }
ON_FILE(ftruncate, "truncate", (int fd, off_t size), (fd, size))
ON_FILE(ftruncate64, "truncate", (int fd, off64_t size), (fd, size))
ON_FILE(fsync, "fsync", (int fd), (fd))
ON_FILE(fdatasync, "fsync", (int fd), (fd))
ON_FILE(fchmod, "chmod", (int fd, mode_t mode), (fd, mode))

int close(int fd) {
  int torn = 0;
  if (of(fd)) meet("close", of(fd), NULL, 0, &torn);
  opened(fd, NULL);
  int result = REAL(close)(fd);
  after(torn);
  return result;
}

#define ON_PATH(call, type, at, declared, given)                \
  int call declared {                                           \
    char room[2 * LONGEST];                                     \
    const char *path = place(at, name, room);                   \
    int torn;                                                   \
    if (!counts(path)) return REAL(call) given;                 \
    if (meet(type, path, NULL, 1, &torn)) return -1;            \
    int result = REAL(call) given;                              \
    int code = errno;                                           \
    after(torn);                                                \
    errno = code;                                               \
    return result;                                              \
  }
ON_PATH(mkdir, "mkdir", AT_FDCWD, (const char *name, mode_t mode), (name, mode))
ON_PATH(mkdirat, "mkdir", at, (int at, const char *name, mode_t mode), (at, name, mode))
ON_PATH(rmdir, "rmdir", AT_FDCWD, (const char *name), (name))
ON_PATH(unlink, "unlink", AT_FDCWD, (const char *name), (name))
ON_PATH(unlinkat, "unlink", at, (int at, const char *name, int flags), (at, name, flags))

#define ON_TWO(call, from_at, to_at, declared, given, refused)  \
  int call declared {                                           \
    char room[2 * LONGEST], other[2 * LONGEST];                 \
    const char *from = place(from_at, old, room), *to = place(to_at, new, other); \
    int torn;                                                   \
    if (!counts(from) && !counts(to)) return REAL(call) given;  \
    if (meet(#call, from, to, 1, &torn)) return -1;             \
    if (refused) return errno = EINVAL, -1;                     \
    int result = REAL(call) given;                              \
    int code = errno;                                           \
    after(torn);                                                \
    errno = code;                                               \
    return result;                                              \
  }
ON_TWO(rename, AT_FDCWD, AT_FDCWD, (const char *old, const char *new), (old, new), 0)
ON_TWO(renameat, a, b, (int a, const char *old, int b, const char *new), (a, old, b, new), 0)
ON_TWO(renameat2, a, b, (int a, const char *old, int b, const char *new, unsigned flags), (a, old, b, new, flags), no_exchange)
