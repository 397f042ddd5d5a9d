// Preloaded into a test's process: from the n-th write on the storage is full or fails, or the process is killed before it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <sys/types.h>
#include <unistd.h>

enum fault { FULL, FAILS, KILLS };

static long left = -1, seen;
static enum fault fault;

void faults_begin(long after, int kind) { left = after; fault = kind; seen = 0; }
long faults_seen(void) { return seen; }

static int struck(void)
{
    seen++;
    if (left < 0 || left-- > 0)
        return 0;
    if (fault == KILLS)
        kill(getpid(), SIGKILL);
    left = 0; /* it stays so */
    errno = fault == FULL ? ENOSPC : EIO;
    return 1;
}

ssize_t pwrite64(int fd, const void *bytes, size_t count, off64_t at)
{
    ssize_t (*real)(int, const void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pwrite64");
    return struck() ? -1 : real(fd, bytes, count, at);
}

ssize_t pwrite(int fd, const void *bytes, size_t count, off_t at) { return pwrite64(fd, bytes, count, at); }

int ftruncate64(int fd, off64_t length)
{
    int (*real)(int, off64_t) = dlsym(RTLD_NEXT, "ftruncate64");
    return fault != FULL && struck() ? -1 : real(fd, length);
}

int ftruncate(int fd, off_t length) { return ftruncate64(fd, length); }
