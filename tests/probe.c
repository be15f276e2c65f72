/* What a container may do, asked of the kernel directly: the C library would hide the high bits of a family.
   probe FAMILY [TYPE [PROTOCOL]]   socket(2); numbers as 64 bits. Prints "ok" or the errno.
   probe uring FAMILY               the same by io_uring, which no seccomp filter sees. */
#include <errno.h>
#include <linux/io_uring.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *ring(long fd, size_t size, off_t which)
{
    return mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, which);
}

/* The socket, or minus the errno. */
static long by_uring(int family)
{
    struct io_uring_params p = {0};
    long fd = syscall(SYS_io_uring_setup, 1, &p);
    if (fd < 0)
        return -errno;
    char *submit = ring(fd, p.sq_off.array + sizeof(unsigned), IORING_OFF_SQ_RING);
    char *complete = ring(fd, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), IORING_OFF_CQ_RING);
    struct io_uring_sqe *entry = ring(fd, sizeof(*entry), IORING_OFF_SQES);
    memset(entry, 0, sizeof(*entry));
    entry->opcode = IORING_OP_SOCKET;
    entry->fd = family;
    entry->off = 1; /* SOCK_STREAM */
    *(unsigned *)(submit + p.sq_off.array) = 0;
    *(unsigned *)(submit + p.sq_off.tail) = 1;
    if (syscall(SYS_io_uring_enter, fd, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) < 0)
        return -errno;
    return ((struct io_uring_cqe *)(complete + p.cq_off.cqes))->res;
}

int main(int argc, char **argv)
{
    unsigned long long given[3] = {0, 1, 0};
    long fd;
    if (argc == 3 && !strcmp(argv[1], "uring")) {
        fd = by_uring(atoi(argv[2]));
        errno = fd < 0 ? -fd : 0;
    } else {
        for (int i = 1; i < argc && i <= 3; i++)
            given[i - 1] = strtoull(argv[i], NULL, 0);
        fd = syscall(SYS_socket, given[0], given[1], given[2]);
    }
    if (fd >= 0)
        puts("ok");
    else
        printf("%d\n", errno);
    return 0;
}
