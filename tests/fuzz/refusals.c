/* A kernel that refuses: calls of libc that fail as they are told to. Preloaded (LD_PRELOAD), or linked with a program.
 *
 * What fails is in an array of struct refusal, one for each kind of call: in the file that OVERLAYNET_REFUSALS names, which
 * whoever tests may change at any time; without such a file, in the program's memory. refusals.py is its other side.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "refusals.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif
/* TUN_F_USO4 and TUN_F_USO6, of Linux 6.2. */
enum { USO = 0x20 | 0x40, OFFLOAD_HEADER_BYTES = 10, LARGEST_PACKET = 65535 };

static struct refusal own[REFUSALS];
struct refusal *refusals = own;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void map_file(void)
{
    const char *path = getenv("OVERLAYNET_REFUSALS");
    if (path == NULL)
        return;
    int descriptor = open(path, O_RDWR | O_CLOEXEC);
    void *mapped = descriptor < 0 ? MAP_FAILED : mmap(NULL, sizeof own, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (mapped == MAP_FAILED) {
        perror(path);
        abort();
    }
    close(descriptor);
    refusals = mapped;
}

/* Whether this call is to fail, with errno set then. */
static bool refused(enum refusable call)
{
    struct refusal *refusal = &refusals[call];
    if (refusal->error == 0)
        return false;
    pthread_mutex_lock(&lock);
    int error = refusal->error;
    if (error != 0 && refusal->skip > 0) {
        refusal->skip--;
        error = 0;
    } else if (error != 0) {
        refusal->refused++;
        if (refusal->times > 0 && --refusal->times == 0)
            refusal->error = 0;
    }
    pthread_mutex_unlock(&lock);
    if (error != 0)
        errno = error;
    return error != 0;
}

/* The function that ours stands before. */
#define REAL(name) \
    static __typeof__(&name) real; \
    if (real == NULL) \
        *(void **)&real = dlsym(RTLD_NEXT, #name)

int ioctl(int descriptor, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    REAL(ioctl);
    if (request == TUNSETOFFLOAD &&
        (((uintptr_t)argument & USO && refused(REFUSE_DEVICE_UDP)) || refused(REFUSE_DEVICE_OFFLOADS)))
        return -1;
    if (request == TUNSETIFF) {
        short flags = ((struct ifreq *)argument)->ifr_flags;
        if ((flags & IFF_VNET_HDR && refused(REFUSE_DEVICE_HEADER)) || (flags & IFF_NAPI && refused(REFUSE_DEVICE_GRO)))
            return -1;
    }
    return real(descriptor, request, argument);
}

/* What Python opens files with. */
int open64(const char *path, int flags, ...)
{
    va_list arguments;
    va_start(arguments, flags);
    int mode = va_arg(arguments, int);
    va_end(arguments);
    REAL(open64);
    const char *name = strrchr(path, '/');
    bool timeout = name != NULL && strcmp(name, "/gro_flush_timeout") == 0;
    return timeout && refused(REFUSE_GRO_TIMEOUT) ? -1 : real(path, flags, mode);
}

int setsockopt(int descriptor, int level, int option, const void *value, socklen_t size)
{
    REAL(setsockopt);
    if (level == IPPROTO_UDP && ((option == UDP_SEGMENT && refused(REFUSE_SOCKET_SEGMENT)) ||
                                 (option == UDP_GRO && refused(REFUSE_SOCKET_GRO))))
        return -1;
    return real(descriptor, level, option, value, size);
}

static bool is_segmented(const struct msghdr *message)
{
    struct cmsghdr *control = CMSG_FIRSTHDR(message);
    for (; control != NULL; control = CMSG_NXTHDR((struct msghdr *)message, control))
        if (control->cmsg_level == IPPROTO_UDP && control->cmsg_type == UDP_SEGMENT)
            return true;
    return false;
}

static bool is_internet(const struct sockaddr *address)
{
    return address != NULL && (address->sa_family == AF_INET || address->sa_family == AF_INET6);
}

static bool message_refused(const struct msghdr *message)
{
    return is_internet(message->msg_name) &&
           ((is_segmented(message) && refused(REFUSE_SEND_SEGMENTED)) || refused(REFUSE_SEND));
}

ssize_t sendmsg(int descriptor, const struct msghdr *message, int flags)
{
    REAL(sendmsg);
    return message_refused(message) ? -1 : real(descriptor, message, flags);
}

/* As the kernel does: the messages before the one that fails are sent, and the error is that of the first alone. */
int sendmmsg(int descriptor, struct mmsghdr *messages, unsigned count, int flags)
{
    REAL(sendmmsg);
    for (unsigned i = 0; i < count; i++)
        if (message_refused(&messages[i].msg_hdr))
            return i == 0 ? -1 : real(descriptor, messages, i, flags);
    return real(descriptor, messages, count, flags);
}

ssize_t sendto(int descriptor, const void *data, size_t size, int flags, const struct sockaddr *address, socklen_t length)
{
    REAL(sendto);
    return is_internet(address) && refused(REFUSE_SEND) ? -1 : real(descriptor, data, size, flags, address, length);
}

static bool receive_refused(int descriptor)
{
    int domain = 0;
    socklen_t size = sizeof domain;
    return refusals[REFUSE_RECEIVE].error != 0 && getsockopt(descriptor, SOL_SOCKET, SO_DOMAIN, &domain, &size) == 0 &&
           (domain == AF_INET || domain == AF_INET6) && refused(REFUSE_RECEIVE);
}

int recvmmsg(int descriptor, struct mmsghdr *messages, unsigned count, int flags, struct timespec *timeout)
{
    REAL(recvmmsg);
    return receive_refused(descriptor) ? -1 : real(descriptor, messages, count, flags, timeout);
}

ssize_t recvmsg(int descriptor, struct msghdr *message, int flags)
{
    REAL(recvmsg);
    return receive_refused(descriptor) ? -1 : real(descriptor, message, flags);
}

ssize_t read(int descriptor, void *data, size_t size)
{
    REAL(read);
    return size == OFFLOAD_HEADER_BYTES + LARGEST_PACKET && refused(REFUSE_READ) ? -1 : real(descriptor, data, size);
}

ssize_t writev(int descriptor, const struct iovec *pieces, int count)
{
    REAL(writev);
    if (count > 1 && pieces[0].iov_len == OFFLOAD_HEADER_BYTES) {
        bool run = ((const uint8_t *)pieces[0].iov_base)[1] != 0;
        if ((run && refused(REFUSE_WRITE_RUN)) || refused(REFUSE_WRITE))
            return -1;
    }
    return real(descriptor, pieces, count);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *), void *argument)
{
    REAL(pthread_create);
    return refused(REFUSE_THREAD) ? errno : real(thread, attributes, start, argument);
}
